"""Generating tokens with a cache: greedily for one prompt, or by sampling for a batch of equally long prompts.

For evaluation inside training and for tests; serving many requests is the engine's business. Sampling noise comes from
a generator on the CPU, so the same seed draws the same noise on every chip.

B batch, T tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from beringia.model.cache import KeyValueCache
from beringia.model.decoder import Decoder


@torch.no_grad()
def greedy(
    decoder: Decoder, prompt_tokens: Sequence[int] | torch.Tensor, max_new_tokens: int, end_token: int | None
) -> list[int]:
    """The most likely continuation, token by token, up to and including `end_token`."""
    prompt_T = torch.as_tensor(prompt_tokens, device=_device(decoder))
    new_BT = sample(decoder, prompt_T.unsqueeze(0), max_new_tokens, end_token, 0.0, None)
    return [int(token) for token in new_BT[0].tolist()]


@torch.no_grad()
def sample(
    decoder: Decoder,
    prompts_BT: torch.Tensor,
    max_new_tokens: int,
    end_token: int | None,
    temperature: float = 1.0,
    generator: torch.Generator | None = None,
    beat: Callable[[], None] = lambda: None,
) -> torch.Tensor:
    """New tokens for each prompt, int64 on the CPU; a finished row is filled with `end_token`. `beat` is called before
    each token.

    Draws by adding Gumbel noise to the logits over `temperature`; 0 takes the most likely token.
    """
    was_training = decoder.training
    decoder.eval()
    cache = KeyValueCache(decoder.config.num_hidden_layers)
    tokens_BT = prompts_BT.to(_device(decoder))
    new: list[torch.Tensor] = []
    done_B = torch.zeros(len(prompts_BT), dtype=torch.bool)
    while len(new) < max_new_tokens and not bool(done_B.all()):
        beat()
        next_B = _pick(decoder.logits(tokens_BT, cache)[:, -1].cpu(), temperature, generator)
        if end_token is not None:
            next_B = next_B.masked_fill(done_B, end_token)
            done_B |= next_B == end_token
        new.append(next_B)
        tokens_BT = next_B.unsqueeze(1).to(tokens_BT.device)
    decoder.train(was_training)
    return torch.stack(new, dim=1) if new else prompts_BT.new_empty(len(prompts_BT), 0)


def _pick(logits_BV: torch.Tensor, temperature: float, generator: torch.Generator | None) -> torch.Tensor:
    if temperature == 0:
        return logits_BV.argmax(-1)
    exponential = torch.empty(logits_BV.shape, dtype=torch.float64).exponential_(generator=generator)
    return (logits_BV.double() / temperature - exponential.log()).argmax(-1)


def _device(decoder: Decoder) -> torch.device:
    return decoder.lm_head.weight.device
