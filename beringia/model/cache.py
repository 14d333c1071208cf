"""What decoding remembers of earlier tokens, layer by layer.

Two tensors a layer: keys and values (B G S H), or for latent attention the normed latent (B 1 S R) and the rotated
shared key (B 1 S P), which is what makes DeepSeek's cache small. Grows by concatenation; a paged cache is the engine's.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch


class LayerCache:
    """The two tensors of one layer, tokens along dimension 2."""

    def __init__(self) -> None:
        self.first: torch.Tensor | None = None
        self.second: torch.Tensor | None = None

    @property
    def length(self) -> int:
        """Tokens remembered."""
        return 0 if self.first is None else self.first.shape[2]

    def taken(self, rows: Sequence[int], length: int) -> LayerCache:
        """Of these rows, in this order, what is remembered of their first tokens."""
        taken = LayerCache()
        if self.first is not None and self.second is not None and length:
            index = torch.tensor(rows).to(self.first.device)
            taken.first, taken.second = (
                part.index_select(0, index)[:, :, :length] for part in (self.first, self.second)
            )
        return taken

    def extend(self, first: torch.Tensor, second: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Append the new tokens' tensors; returns those of all tokens."""
        if self.first is not None and self.second is not None:
            first = torch.cat((self.first, first), dim=2)
            second = torch.cat((self.second, second), dim=2)
        self.first, self.second = first, second
        return first, second


class KeyValueCache:
    """One `LayerCache` a layer."""

    def __init__(self, num_layers: int) -> None:
        self.layers = [LayerCache() for _ in range(num_layers)]

    @property
    def length(self) -> int:
        """Tokens remembered."""
        return self.layers[0].length

    def taken(self, rows: Sequence[int], length: int) -> KeyValueCache:
        """Of these rows, which may come several times, the first `length` tokens: what requests share, or go on
        with."""
        taken = KeyValueCache(0)
        taken.layers = [layer.taken(rows, length) for layer in self.layers]
        return taken
