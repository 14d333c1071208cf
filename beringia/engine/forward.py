"""The decoder's forward pass for inference: all rows of a step at once, whatever sequences they belong to.

Computes what `model/` computes (tested against it and against transformers), from effective weights and on the paged
cache. Latent attention stays on the compressed cache: queries are brought into the latent space, and values out of it,
so a token's keys and values are never written out (the absorbed form, DeepSeek-V2, arXiv 2405.04434 section 2.1.2).

M rows of the step, D hidden, N heads, G key-value heads, H head width, P its rotary part, V width of values, R latent
rank, A experts a token, E experts, F expert width, L positions, Q rotary pairs, W width of a row in the cache, X any.
"""

from __future__ import annotations

import torch

from beringia.engine.cache import PagedCache
from beringia.engine.operators import Operators
from beringia.engine.places import Places
from beringia.engine.weights import Weights
from beringia.model import rope as rotary
from beringia.model.attention import LATENT_NORM_EPS
from beringia.model.experts import Router
from beringia.model.layers import precise
from beringia.model.rope import softmax_scale


class Forward:
    """Rows to logits. Holds the weights and the cache, and no state of its own."""

    def __init__(self, weights: Weights, cache: PagedCache, operators: Operators, router: Router | None) -> None:
        """`router` says how experts are chosen; its own weights are not read.

        Rotary angles of all positions are computed on the CPU, once, so that every chip rotates by the same table.
        """
        self._weights = weights
        self._cache = cache
        self._operators = operators
        self._router = router
        self._config = weights.config
        self._scale = softmax_scale(weights.config)
        self._attention = self._latent if weights.config.latent else self._grouped
        cos_LQ, sin_LQ = rotary.table(weights.config, torch.arange(weights.config.context_tokens))
        self._rope = cos_LQ.to(weights.device), sin_LQ.to(weights.device)

    def __call__(self, places: Places, wanted: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Float32 logits (float64 for float64) of the wanted rows; and all rows before the head, for drafts. On the
        device."""
        config, operators = self._config, self._operators
        x_MD = operators.embed(self._weights.matrix("embed"), places.token_M)
        for layer in range(config.num_hidden_layers):
            x_MD = self._layer(x_MD, layer, places)
        hidden_MD = self._norm(x_MD, "norm", config.rms_norm_eps)
        return self._head(hidden_MD.index_select(0, wanted)), hidden_MD

    def draft(self, places: Places, hidden_MD: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
        """Float32 logits of the token after each wanted row's, from the multi-token prediction layer (DeepSeek-V3,
        arXiv 2412.19437 section 2.2): each row has a token, and the hidden state of the token before it.

        Its cache holds what a token and all before it determine, so that beginnings are shared as in other layers;
        the first token has no row.
        """
        config, operators = self._config, self._operators
        x_MD = operators.embed(self._weights.matrix("embed"), places.token_M)
        joined_MX = x_MD.new_empty(len(x_MD), 2 * config.hidden_size)
        self._norm(x_MD, "draft.embed_norm", config.rms_norm_eps, out=joined_MX[:, : config.hidden_size])
        self._norm(hidden_MD, "draft.hidden_norm", config.rms_norm_eps, out=joined_MX[:, config.hidden_size :])
        x_MD = self._layer(self._linear(joined_MX, "draft.join"), config.num_hidden_layers, places, start=1)
        return self._head(self._norm(x_MD.index_select(0, wanted), "draft.norm", config.rms_norm_eps))

    def _layer(self, x_MD: torch.Tensor, layer: int, places: Places, start: int = 0) -> torch.Tensor:
        path, eps = f"layers.{layer}", self._config.rms_norm_eps
        attended_MX = self._attention(self._norm(x_MD, f"{path}.input_norm", eps), path, layer, places, start)
        x_MD = self._linear(attended_MX, f"{path}.attention.o", add_to=x_MD)
        return self._feed(self._norm(x_MD, f"{path}.post_norm", eps), path, x_MD)

    def _head(self, hidden_RD: torch.Tensor) -> torch.Tensor:
        return self._operators.linear(hidden_RD, self._weights.head).to(precise(self._weights.dtype))

    # Attention

    def _grouped(self, x_MD: torch.Tensor, path: str, layer: int, places: Places, start: int) -> torch.Tensor:
        config, path = self._config, f"{path}.attention"
        heads_MXH = self._linear(x_MD, f"{path}.qkv").view(len(x_MD), -1, config.head_dim)
        q_MNH, k_MGH, _ = torch.split(heads_MXH, [config.num_attention_heads, *[config.num_key_value_heads] * 2], dim=1)
        if config.qk_norm:
            self._norm(q_MNH, f"{path}.q_norm", config.rms_norm_eps, out=q_MNH)
            self._norm(k_MGH, f"{path}.k_norm", config.rms_norm_eps, out=k_MGH)
        self._rotate(q_MNH, places, out=q_MNH)
        self._rotate(k_MGH, places, out=k_MGH)
        row_MW = heads_MXH[:, config.num_attention_heads :].flatten(1)
        return self._attend(q_MNH, row_MW, layer, places, start).flatten(1)

    def _latent(self, x_MD: torch.Tensor, path: str, layer: int, places: Places, start: int) -> torch.Tensor:
        config, weights, operators, path = self._config, self._weights, self._operators, f"{path}.attention"
        rank, nope, turned = config.kv_lora_rank, config.qk_nope_head_dim, config.qk_rope_head_dim
        q_MX, latent_MR, k_MP = self._linear(x_MD, f"{path}.q_kv_down").tensor_split([-(rank + turned), -turned], dim=1)
        if config.q_lora_rank is not None:
            q_MX = self._linear(self._norm(q_MX, f"{path}.q_norm", LATENT_NORM_EPS), f"{path}.q_up")
        row_MW = latent_MR.new_empty(len(x_MD), rank + turned)
        self._norm(latent_MR, f"{path}.kv_norm", LATENT_NORM_EPS, out=row_MW[:, :rank])
        self._rotate(k_MP.unsqueeze(1), places, out=row_MW[:, rank:].unsqueeze(1))
        q_MNH, q_MNP = torch.split(q_MX.view(len(x_MD), -1, nope + turned), [nope, turned], dim=-1)
        q_MNW = q_MNH.new_empty(*q_MNH.shape[:2], rank + turned)
        # Into the latent space: q k = q (up latent) = (q up) latent.
        operators.by_head(q_MNH, weights.matrix(f"{path}.k_up_NRH"), out=q_MNW[..., :rank])
        self._rotate(q_MNP, places, out=q_MNW[..., rank:])
        latent_MNR = self._attend(q_MNW, row_MW, layer, places, start)
        return operators.by_head(latent_MNR, weights.matrix(f"{path}.v_up_NVR")).flatten(1)

    def _attend(
        self, q_MNH: torch.Tensor, row_MW: torch.Tensor, layer: int, places: Places, start: int
    ) -> torch.Tensor:
        cache = self._cache.layers[layer]
        self._operators.keep(cache, places.slot_M, row_MW)
        return self._operators.attend(q_MNH, cache, self._cache.layout, places, self._scale, start)

    # Feed-forward, added to what comes beside it

    def _feed(self, x_MD: torch.Tensor, path: str, add_to: torch.Tensor) -> torch.Tensor:
        if self._weights.has(f"{path}.mlp.down"):
            return self._block(x_MD, f"{path}.mlp", add_to)
        add_to += self._experts(x_MD, f"{path}.experts")
        return self._block(x_MD, f"{path}.shared", add_to) if self._config.n_shared_experts else add_to

    def _block(self, x_MD: torch.Tensor, path: str, add_to: torch.Tensor) -> torch.Tensor:
        gated_MF = self._operators.gate(self._linear(x_MD, f"{path}.gate_up"))
        return self._linear(gated_MF, f"{path}.down", add_to=add_to)

    def _experts(self, x_MD: torch.Tensor, path: str) -> torch.Tensor:
        weights, router, operators = self._weights, self._router, self._operators
        assert router is not None
        bias_E = None if router.e_score_correction_bias is None else weights.vector(f"{path}.router_bias")
        chosen_MA, weights_MA = operators.route(x_MD, weights.matrix(f"{path}.router"), bias_E, router)
        gate_up, down = weights.matrix(f"{path}.gate_up_EFD"), weights.matrix(f"{path}.down_EDF")
        return operators.experts(x_MD, chosen_MA, weights_MA, gate_up, down)

    # Small parts

    def _linear(self, x_MK: torch.Tensor, path: str, add_to: torch.Tensor | None = None) -> torch.Tensor:
        return self._operators.linear(x_MK, self._weights.matrix(path), self._weights.bias(path), add_to)

    def _norm(self, x_MXD: torch.Tensor, path: str, eps: float, out: torch.Tensor | None = None) -> torch.Tensor:
        return self._operators.norm(x_MXD, self._weights.vector(path), eps, out)

    def _rotate(self, x_MNP: torch.Tensor, places: Places, out: torch.Tensor) -> torch.Tensor:
        return self._operators.rotate(x_MNP, self._rope, places.position_M, out)
