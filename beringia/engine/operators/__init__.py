"""What the forward pass is made of, in two kinds: torch's own, on any chip, and compiled C, on the CPU."""

from beringia.engine.operators.operators import CacheLayout, Operators, open_operators

__all__ = ["CacheLayout", "Operators", "open_operators"]
