"""The embedding: rows looked up are the table's rows, and its gradient is the sum of what came back for each token.

Looking up changes nothing but the dtype. The gradient is checked by projection (`products.py`): for a vector z of
random signs, (gradient of the table) z must be, row by row, the sum over that token's positions of (gradient of the
output) z. With tied weights the head's gradient is in the same tensor, and only the rows looked up are checked.

M positions, V vocabulary, D hidden.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from beringia.model.layers import precise
from beringia.numerics.metrics import accumulation_floor, difference, rounding_floor
from beringia.numerics.replay import Call
from beringia.train.guard.capture import EMBEDDING, SiteCapture
from beringia.train.guard.check import Step, Training
from beringia.train.guard.finding import Finding
from beringia.train.guard.products import PROJECTION_ALLOWED, random_signs
from beringia.train.guard.shadow import DETECTOR
from beringia.train.sharding import sum_of_host_values, whole


def judge_embedding(
    training: Training, capture: SiteCapture, weights: Mapping[str, torch.Tensor], step: Step
) -> list[Finding]:
    """Findings about the rows looked up and, where no head is tied to it, the table's gradient."""
    calls = capture.calls[EMBEDDING]
    table_VD = weights[f"{EMBEDDING}.weight"]
    findings = [judge_rows(calls, table_VD, step.draw("sample"))]
    gradient = training.decoder.model.embed_tokens.weight.grad
    if gradient is not None and not training.decoder.config.tie_word_embeddings:
        projection = Projection(calls, table_VD.shape, step.draw("signs"))
        # Ranks average their gradients, so the sum of what they expect is shared out alike.
        expected_V = sum_of_host_values(projection.expected_V, training.chip.device) / training.ranks.count
        findings.append(projection.judge(whole(gradient), expected_V))
    return findings


def judge_rows(calls: Sequence[Call], table_VD: torch.Tensor, sample: int) -> Finding:
    """Compare one sample's rows with the table's."""
    call = calls[0]
    place = sample % call.output.shape[0]
    tokens_T = call.inputs[0][place].cpu()
    found_TD = call.output[place].cpu()
    expected_TD = table_VD.detach().cpu()[tokens_T].to(torch.float64)
    error = difference(found_TD, expected_TD)
    bound = rounding_floor(found_TD.dtype) if found_TD.dtype != table_VD.dtype else 0.0
    return Finding(DETECTOR, EMBEDDING, "output", error.relative, bound, "relative error of the rows looked up")


class Projection:
    """What one rank's positions contribute to the table's gradient, projected."""

    def __init__(self, calls: Sequence[Call], shape_VD: torch.Size, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self._signs_D = random_signs(shape_VD[1], generator)
        self.expected_V = torch.zeros(shape_VD[0], dtype=torch.float64)
        self._positions = 0
        for call in calls:
            if call.output_gradient is not None:
                self._add(call.inputs[0].cpu().flatten(), call.output_gradient.cpu().flatten(0, -2))

    def judge(self, gradient_VD: torch.Tensor, expected_V: torch.Tensor) -> Finding:
        """Compare the table's gradient, whole, with the average over ranks of what each expects."""
        here_VD = gradient_VD.detach().cpu().to(torch.float64)
        error = torch.linalg.vector_norm(here_VD @ self._signs_D - expected_V).item()
        size = torch.linalg.vector_norm(here_VD).item()
        precision = precise(gradient_VD.dtype)
        bound = accumulation_floor(self._positions, precision) + rounding_floor(precision)
        return Finding(
            DETECTOR,
            EMBEDDING,
            "weight.gradient",
            error / size if size else error,
            PROJECTION_ALLOWED * bound,
            "projected error relative to the gradient",
        )

    def _add(self, tokens_M: torch.Tensor, gradient_MD: torch.Tensor) -> None:
        self.expected_V.index_add_(0, tokens_M, gradient_MD.to(torch.float64) @ self._signs_D)
        self._positions += len(tokens_M)
