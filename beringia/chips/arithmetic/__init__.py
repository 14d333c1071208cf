"""What a chip's arithmetic is, as data (`profile.py`), and products of matrices computed by it.

The emulated device computes with it, and qualification measures it. Nothing here knows of faults.
"""

from beringia.chips.arithmetic.products import matmul

__all__ = ["matmul"]
