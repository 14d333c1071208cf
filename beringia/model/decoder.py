"""The decoder: embedding, layers, norm, head, and DeepSeek's multi-token prediction as one more layer.

Parameter names are those of the Hugging Face checkpoint, except that experts are stacked (`hugging_face.py` splits and
joins them). Master weights are float32; `set_compute_dtype` says what the products run in. Norms, router, softmax and
loss stay in float32. Reads and writes no files.

B batch, T tokens, D hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple, Protocol

import torch
from torch import nn
from torch.nn import functional as F

from beringia.model import rope as rotary
from beringia.model.attention import attention_of
from beringia.model.cache import KeyValueCache, LayerCache
from beringia.model.config import DecoderConfig
from beringia.model.experts import MixtureOfExperts
from beringia.model.layers import FeedForward, Linear, RMSNorm, precise
from beringia.model.rope import Rope

IGNORED = -100
"""Label of a position that is not a target."""


Targets = Mapping[str, torch.Tensor]
"""What predictions are judged by, B T each, by name: position t of each belongs to the prediction of position t."""
Sums = dict[str, torch.Tensor]
"""Sums over the targets of a batch, by name."""


class Criterion(Protocol):
    """What judges predictions inside the forward pass, where sharded weights are whole and a compiler sees it too."""

    def sums(self, logits_BTV: torch.Tensor, targets: Targets) -> Sums:
        """Of the model's predictions."""

    def sums_ahead(self, logits_BTV: torch.Tensor, targets: Targets) -> Sums:
        """Of those of the multi-token layer: its position t belongs to position t + 1 of the batch."""


class Losses(NamedTuple):
    """Sums of cross-entropy in nats, and how many targets each has: ranks and accumulation steps add up exactly."""

    main_sum: torch.Tensor
    mtp_sum: torch.Tensor
    target_count: torch.Tensor
    mtp_count: torch.Tensor


class DecoderLayer(nn.Module):
    """Attention, then experts or a dense block, each behind a norm and beside a residual.

    `layer(x_BTD, decoder.rope(positions))` works by itself, in the dtype of `x_BTD`: the guard replays layers this way.
    """

    __call__: Callable[..., torch.Tensor]

    def __init__(self, config: DecoderConfig, index: int) -> None:
        super().__init__()
        self.self_attn: nn.Module = attention_of(config)
        self.mlp: nn.Module
        if config.is_sparse(index):
            self.mlp = MixtureOfExperts(config)
        else:
            self.mlp = FeedForward(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, x_BTD: torch.Tensor, rope: Rope, cache: LayerCache | None = None) -> torch.Tensor:
        attended_BTD: torch.Tensor = self.self_attn(self.input_layernorm(x_BTD), rope, cache)
        x_BTD = x_BTD + attended_BTD
        fed_BTD: torch.Tensor = self.mlp(self.post_attention_layernorm(x_BTD))
        return x_BTD + fed_BTD


class SharedHead(nn.Module):
    """The norm before the head that the multi-token prediction layer shares with the model."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)


class MultiTokenLayer(DecoderLayer):
    """Predicts the token after the next (DeepSeek-V3 section 2.2); embedding and head are the model's own.

    Takes the model's hidden state after its last norm, which is what vLLM and transformers feed it when they draft.
    """

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__(config, config.num_hidden_layers)
        self.enorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.hnorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.eh_proj = Linear(2 * config.hidden_size, config.hidden_size, bias=False)
        self.shared_head = SharedHead(config)

    def predict(self, hidden_BTD: torch.Tensor, next_BTD: torch.Tensor, rope: Rope) -> torch.Tensor:
        """Hidden state and embedding of the following token, position by position, to what the head reads."""
        joined = torch.cat((self.enorm(next_BTD), self.hnorm(hidden_BTD)), dim=-1)
        return self.shared_head.norm(self(self.eh_proj(joined), rope))


class Trunk(nn.Module):
    """Everything under the checkpoint's prefix `model.`; the multi-token layer is number `num_hidden_layers`."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(
            config.vocab_size, config.hidden_size, _weight=torch.empty(config.vocab_size, config.hidden_size)
        )
        layers: list[nn.Module] = [DecoderLayer(config, index) for index in range(config.num_hidden_layers)]
        layers += [MultiTokenLayer(config) for _ in range(config.num_nextn_predict_layers)]
        self.layers = nn.ModuleList(layers)
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)


class Decoder(nn.Module):
    """A causal language model of what its config says.

    >>> decoder = Decoder(preset("r2-nano"))        # parameters are not initialised yet: initialise(decoder, seed)
    >>> logits_BTV = decoder(tokens_BT)             # float32
    >>> losses = decoder(tokens_BT, labels_BT)      # sums and counts; labels_BT[b, t] is the target of position t
    >>> sums = decoder(tokens_BT, targets=targets, criterion=criterion)     # what another criterion makes of it
    """

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.config = config
        self.compute_dtype = torch.float32
        self.model = Trunk(config)
        self.lm_head = Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    @property
    def layers(self) -> nn.ModuleList:
        """The layers of the trunk, without the multi-token layer."""
        return self.model.layers[: self.config.num_hidden_layers]

    @property
    def mtp(self) -> MultiTokenLayer | None:
        """The multi-token prediction layer, if the model has one."""
        last = self.model.layers[-1]
        return last if isinstance(last, MultiTokenLayer) else None

    def leave_experts_eager(self) -> None:
        """To be called before compiling: the sizes of the experts' products depend on the data, and every new size
        would be compiled anew."""
        for _, mlp in _sparse_layers(self):
            mlp.leave_experts_eager()

    def set_compute_dtype(self, dtype: torch.dtype) -> None:
        """What activations and products are in from now on; weights stay as they are."""
        self.compute_dtype = dtype

    def rope(self, positions: torch.Tensor) -> Rope:
        """cos and sin of each position, float32, on the device of `positions` (computed on the CPU)."""
        return rotary.table(self.config, positions)

    def forward(
        self,
        tokens_BT: torch.Tensor,
        labels_BT: torch.Tensor | None = None,
        *,
        mtp: bool = True,
        cache: KeyValueCache | None = None,
        targets: Targets | None = None,
        criterion: Criterion | None = None,
    ) -> torch.Tensor | Losses | Sums:
        """Logits B T V in float32, or with labels the `Losses`, or with targets what the criterion makes of them
        (through `__call__`, so that DDP and FSDP2 see it)."""
        if criterion is not None and targets is not None:
            return self.sums(tokens_BT, targets, criterion, mtp=mtp)
        if labels_BT is not None:
            return self.losses(tokens_BT, labels_BT, mtp=mtp)
        return self.logits(tokens_BT, cache)

    def logits(self, tokens_BT: torch.Tensor, cache: KeyValueCache | None = None) -> torch.Tensor:
        """Logits B T V, float32; with a cache, of the tokens that follow those in it."""
        return self._head(self._hidden(tokens_BT, cache))

    def losses(self, tokens_BT: torch.Tensor, labels_BT: torch.Tensor, *, mtp: bool = True) -> Losses:
        """Summed cross-entropy over labels that are not -100. `labels_BT` is already shifted.

        The multi-token layer at position t sees token t + 1 and predicts `labels_BT[:, t + 1]`.
        """
        hidden_BTD = self._hidden(tokens_BT, None)
        main_sum = cross_entropy_sum(self._head(hidden_BTD), labels_BT)
        target_count = (labels_BT != IGNORED).sum()
        ahead_BTD = self._look_ahead(hidden_BTD, tokens_BT) if mtp else None
        if ahead_BTD is None:
            return Losses(main_sum, main_sum.new_zeros(()), target_count, torch.zeros_like(target_count))
        later_BT = labels_BT[:, 1:]
        mtp_sum = cross_entropy_sum(self._head(ahead_BTD), later_BT)
        return Losses(main_sum, mtp_sum, target_count, (later_BT != IGNORED).sum())

    def sums(self, tokens_BT: torch.Tensor, targets: Targets, criterion: Criterion, *, mtp: bool = True) -> Sums:
        """What a criterion makes of the predictions, and of those of the multi-token layer."""
        hidden_BTD = self._hidden(tokens_BT, None)
        sums = criterion.sums(self._head(hidden_BTD), targets)
        ahead_BTD = self._look_ahead(hidden_BTD, tokens_BT) if mtp else None
        if ahead_BTD is None:
            return sums
        later = {name: target_BT[:, 1:] for name, target_BT in targets.items()}
        return sums | criterion.sums_ahead(self._head(ahead_BTD), later)

    def expert_counts(self) -> dict[int, torch.Tensor]:
        """The live counts of each sparse layer, by layer number; all-reduce them in place before updating biases."""
        return {index: mlp.expert_counts for index, mlp in _sparse_layers(self)}

    def rope_at(self, start: int, length: int, device: torch.device) -> Rope:
        """`rope` for consecutive positions, known on the host, so that nothing waits for the device."""
        cos_TQ, sin_TQ = self.rope(torch.arange(start, start + length, device="cpu"))
        return cos_TQ.to(device), sin_TQ.to(device)

    def _embed(self, tokens_BT: torch.Tensor) -> torch.Tensor:
        embedded_BTD: torch.Tensor = self.model.embed_tokens(tokens_BT)
        return embedded_BTD.to(self.compute_dtype)

    def _hidden(self, tokens_BT: torch.Tensor, cache: KeyValueCache | None) -> torch.Tensor:
        start = 0 if cache is None else cache.length
        rope = self.rope_at(start, tokens_BT.shape[1], tokens_BT.device)
        x_BTD = self._embed(tokens_BT)
        for index in range(self.config.num_hidden_layers):
            x_BTD = self.model.layers[index](x_BTD, rope, None if cache is None else cache.layers[index])
        return self.model.norm(x_BTD)

    def _look_ahead(self, hidden_BTD: torch.Tensor, tokens_BT: torch.Tensor) -> torch.Tensor | None:
        layer = self.mtp
        if layer is None:
            return None
        rope = self.rope_at(0, tokens_BT.shape[1] - 1, tokens_BT.device)
        return layer.predict(hidden_BTD[:, :-1], self._embed(tokens_BT[:, 1:]), rope)

    def _head(self, hidden_BTD: torch.Tensor) -> torch.Tensor:
        logits_BTV = self.lm_head(hidden_BTD)
        return logits_BTV.to(precise(logits_BTV.dtype))


def cross_entropy_sum(logits_BTV: torch.Tensor, labels_BT: torch.Tensor) -> torch.Tensor:
    """Cross-entropy in nats, summed over the labels that are not -100."""
    return F.cross_entropy(logits_BTV.flatten(0, 1), labels_BT.flatten(), ignore_index=IGNORED, reduction="sum")


def _sparse_layers(decoder: Decoder) -> list[tuple[int, MixtureOfExperts]]:
    layers = enumerate(decoder.model.layers)
    return [(index, layer.mlp) for index, layer in layers if isinstance(layer.mlp, MixtureOfExperts)]


@torch.no_grad()
def update_router_biases(decoder: Decoder, counts_by_layer: Mapping[int, torch.Tensor], speed: float) -> None:
    """After an optimizer step: raise the bias of experts below their layer's mean load, lower it above it, by `speed`.

    DeepSeek-V3 section 2.1.2; softmax routers have no bias. `counts_by_layer` as `decoder.expert_counts()` gives it,
    summed over ranks. Starts the counts of the decoder anew.
    """
    for index, mlp in _sparse_layers(decoder):
        load_E = counts_by_layer[index].to(torch.float32)
        bias_E = mlp.gate.e_score_correction_bias
        if bias_E is not None:
            bias_E += speed * torch.sign(load_E.mean() - load_E).to(bias_E.dtype)
        mlp.expert_counts.zero_()
