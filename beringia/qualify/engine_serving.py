"""A serving by Beringia's engine: prompts in chunks beside what decodes, all rows of a pass at once, on a paged cache
whose blocks hold equal beginnings once. This is what `beringia serve` computes on a chip.

With torch's operators, which the engine has on every chip (on a CPU it has compiled ones, which compute nothing on
another). What is in a pass is written in the serving: the scheduler, which decides that otherwise, computes on no chip.

M rows of a pass, A experts a token, C compared positions, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch.nn import functional as F

from beringia.engine.cache import PagedCache
from beringia.engine.engine import router_of
from beringia.engine.forward import Forward
from beringia.engine.operators.in_torch import InTorch
from beringia.engine.places import Places
from beringia.engine.sampling import GumbelNoise, Sampling
from beringia.engine.scheduler import Chunk
from beringia.engine.scheduler import Sequence as Request
from beringia.engine.weights import Weights
from beringia.model import Decoder
from beringia.model.experts import Router
from beringia.qualify.serving import BLOCK_TOKENS, Around, Serving, Step


def serve(
    model: Decoder, serving: Serving, routes: Mapping[str, torch.Tensor], around: Callable[[Step], Around]
) -> dict[str, torch.Tensor]:
    """The compared logits C V of a serving, pass by pass, by scenario; `around` each pass, given its first step.
    `routes`: the experts that every token goes to, by layer."""
    device, dtype = next(model.parameters()).device, model.compute_dtype
    operators = _WithRoutes()
    weights = Weights(model, operators, device, dtype)
    requests = _requests(serving)
    num_blocks = 1 + max(block for request in requests for block in request.table)
    cache = PagedCache(model.config, num_blocks, BLOCK_TOKENS, device, dtype)
    forward = Forward(weights, cache, operators, router_of(model))
    found: dict[str, list[torch.Tensor]] = {}
    for steps in serving.passes:
        chunks = [Chunk(requests[row], step.start, step.end) for step in steps for row in step.rows]
        places = Places.of(chunks, BLOCK_TOKENS, device)
        operators.chosen = iter(_chosen(serving, steps, routes, device))
        wanted = _wanted(serving, steps)
        with around(steps[0]):
            logits_CV, _ = forward(places, torch.cat(wanted).to(device))
        for step, compared_CV in zip(steps, torch.split(logits_CV, [len(rows_C) for rows_C in wanted]), strict=True):
            found.setdefault(step.scenario, []).append(compared_CV)
    return {scenario: torch.cat(parts) for scenario, parts in found.items()}


class _WithRoutes(InTorch):
    """Torch's operators, but the experts are those of `chosen`, M A, layer by layer: near a tie another choice is no
    error of arithmetic."""

    chosen: Iterator[torch.Tensor]

    def route(
        self, x_MD: torch.Tensor, weight_ED: torch.Tensor, bias_E: torch.Tensor | None, router: Router
    ) -> tuple[torch.Tensor, torch.Tensor]:
        chosen_MA = next(self.chosen)
        scores_ME = router.squash(F.linear(x_MD.to(weight_ED.dtype), weight_ED))
        return chosen_MA, router.weigh(scores_ME, chosen_MA)


def _requests(serving: Serving) -> list[Request]:
    """One a row, with its blocks: those of an equal beginning are the earlier row's."""
    requests: list[Request] = []
    free = iter(range(len(serving.lengths) * -(-max(serving.lengths) // BLOCK_TOKENS)))
    for row, length in enumerate(serving.lengths):
        tokens = serving.tokens_RT[row, :length].tolist()
        request = Request(row, tokens, length, Sampling(), GumbelNoise(row, 1))
        shared = max((_equal_blocks(tokens, other) for other in requests), key=len, default=[])
        own = -(-length // BLOCK_TOKENS) - len(shared)
        request.table = [*shared, *(next(free) for _ in range(own))]
        requests.append(request)
    return requests


def _equal_blocks(tokens: Sequence[int], other: Request) -> list[int]:
    """Full blocks of another request that hold what these tokens begin with."""
    equal = next(
        (place for place, (one, two) in enumerate(zip(tokens, other.tokens, strict=False)) if one != two),
        min(len(tokens), len(other.tokens)),
    )
    return other.table[: equal // BLOCK_TOKENS]


def _chosen(
    serving: Serving, steps: Sequence[Step], routes: Mapping[str, torch.Tensor], device: torch.device
) -> list[torch.Tensor]:
    """The experts of a pass's rows, by layer in their order."""
    of_steps = [serving.routes_in(step, routes) for step in steps]
    layers = sorted(routes, key=lambda layer: int(layer.rpartition(".")[2]))  # a bundle has them in another order
    return [torch.cat([one[layer] for one in of_steps]).to(device, torch.int64) for layer in layers]


def _wanted(serving: Serving, steps: Sequence[Step]) -> list[torch.Tensor]:
    """Of each step, the rows of the pass that are compared."""
    wanted, first = [], 0
    for step in steps:
        places_C, positions_C = serving.compared(step)
        width = step.end - step.start
        wanted.append(first + places_C * width + positions_C - step.start)
        first += len(step.rows) * width
    return wanted
