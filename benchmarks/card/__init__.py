"""What a machine with an accelerator shows of Beringia, in parts, within minutes and without a network.

`python -m benchmarks.card --chip cuda --out DIR` (or `make card`). A part is one file with a function
`measure(chip, size) -> dict`; it runs in a process of its own and leaves `DIR/<part>.json`. docs/card.md says what
each part measures and how to read it.
"""
