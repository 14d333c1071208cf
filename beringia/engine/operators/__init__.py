"""What the forward pass is made of, in two kinds: torch's own, on any chip, and compiled C, on the CPU."""

from beringia.engine.operators.choice import open_operators
from beringia.engine.operators.operators import CacheLayout, Operators

__all__ = ["CacheLayout", "Operators", "open_operators"]
