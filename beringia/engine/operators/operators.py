"""The interface of the operators that the forward pass calls; `choice.py` says which kind a chip gets.

M rows of the step, K in, N out (or heads, where it follows M), D hidden, F width of the feed-forward block, W width of
a row in the cache, H width of keys, V of values, P rotary width, A experts a token, X anything.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import torch

from beringia.engine.places import Places
from beringia.model.experts import Router
from beringia.model.rope import Rope

Weight = Any
"""What products multiply with, as these operators keep it."""


@dataclass(frozen=True)
class CacheLayout:
    """Where a row of the cache has keys and values: those of group g begin at g * `group_step` and, for values, at
    `value_start` + g * `group_step`."""

    groups: int
    key_width: int
    value_width: int
    group_step: int
    value_start: int


class Operators(ABC):
    """Operators on rows. Where `out` is given, the result is written there, and returned."""

    name: str
    """`torch` or `compiled`, as reports show it."""
    batch_invariant: bool
    """Whether a row's bits are the same whatever else is computed beside it."""

    @abstractmethod
    def weight(self, tensor_XNK: torch.Tensor) -> Weight:
        """A matrix, or several, as products read it."""

    @abstractmethod
    def replace(self, weight: Weight, tensor_XNK: torch.Tensor) -> None:
        """Other numbers for a weight, in place."""

    @abstractmethod
    def plain(self, weight: Weight) -> torch.Tensor:
        """The tensor that a weight was made from."""

    @abstractmethod
    def embed(self, weight_VD: Weight, token_M: torch.Tensor) -> torch.Tensor:
        """Rows of a weight, in the activations' dtype."""

    @abstractmethod
    def norm(
        self, x_MXD: torch.Tensor, weight_D: torch.Tensor, eps: float, out: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Root-mean-square norm over the last dimension."""

    @abstractmethod
    def linear(
        self,
        x_MK: torch.Tensor,
        weight_NK: Weight,
        bias_N: torch.Tensor | None = None,
        add_to: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Rows times a matrix; added to M N rows, in place, where these are given."""

    @abstractmethod
    def by_head(self, x_MNK: torch.Tensor, weight_NXK: Weight, out: torch.Tensor | None = None) -> torch.Tensor:
        """Each head's rows times a matrix of its own: M N X."""

    @abstractmethod
    def rotate(self, x_MNP: torch.Tensor, rope: Rope, position_M: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        """Rotary embedding; `rope` has all positions."""

    @abstractmethod
    def keep(self, cache: torch.Tensor, slot_M: torch.Tensor, row_MW: torch.Tensor) -> None:
        """Write the step's rows into a layer's cache (blocks, tokens in a block, W)."""

    @abstractmethod
    def attend(
        self, q_MNH: torch.Tensor, cache: torch.Tensor, layout: CacheLayout, places: Places, scale: float, start: int
    ) -> torch.Tensor:
        """Every row attends to its sequence's tokens from `start` (0 or 1) up to itself: M N V."""

    @abstractmethod
    def gate(self, x_MF: torch.Tensor) -> torch.Tensor:
        """silu of the first half of each row times the second."""

    @abstractmethod
    def route(
        self, x_MD: torch.Tensor, weight_ED: Weight, bias_E: torch.Tensor | None, router: Router
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Chosen experts (int64) and their weights (float32), each M A; `router` says how."""

    @abstractmethod
    def experts(
        self,
        x_MD: torch.Tensor,
        chosen_MA: torch.Tensor,
        weights_MA: torch.Tensor,
        gate_up_EFD: Weight,
        down_EDF: Weight,
    ) -> torch.Tensor:
        """Each row through its chosen experts, summed with these weights."""
