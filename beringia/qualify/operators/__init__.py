"""Every operator call of a model on a chip, held against float64 with the inputs that it really had.

`watch.py` sees the calls and says where each belongs; `float64.py` computes what each should have given; `bounds.py`
says how far a sound chip may be from that; `check.py` compares. Because a call is judged by its own inputs, errors do
not accumulate, and chips whose lists of operators differ are judged alike.
"""
