"""The decoder's forward pass for inference: all rows of a step at once, whatever sequences they belong to.

Computes what `model/` computes (tested against it and against transformers), from effective weights and on the paged
cache. Latent attention stays on the compressed cache: queries are brought into the latent space, and values out of it,
so a token's keys and values are never written out (the absorbed form, DeepSeek-V2, arXiv 2405.04434 section 2.1.2).

M rows of the step, C sequences that decode (one row each), S tokens in the cache, D hidden, N heads, G key-value heads,
J heads a group, T rows of one sequence, Y = J T, H head width, P its rotary part, V width of values, R latent rank,
L positions, Q rotary pairs, W width of a row in the cache, X anything.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.nn import functional as F

from beringia.engine.cache import PagedCache, Places, Prompt
from beringia.engine.weights import Weights
from beringia.model import rope as rotary
from beringia.model.attention import LATENT_NORM_EPS
from beringia.model.experts import Router, grouped_linear, sort_by_expert
from beringia.model.layers import precise
from beringia.model.rope import Rope, rotate, softmax_scale

Parts = Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
"""Rows of the cache, ... S W, as keys and values, ... G S H and ... G S V."""


class Forward:
    """Rows to logits. Holds the weights and the cache, and no state of its own."""

    def __init__(self, weights: Weights, cache: PagedCache, router: Router | None) -> None:
        """`router` says how experts are chosen; its own weights are not read.

        Rotary angles of all positions are computed on the CPU, once, so that every chip rotates by the same table.
        """
        self._weights = weights
        self._cache = cache
        self._router = router
        self._config = weights.config
        self._scale = softmax_scale(weights.config)
        self._attention = self._latent if weights.config.latent else self._grouped
        cos_LQ, sin_LQ = rotary.table(weights.config, torch.arange(weights.config.max_position_embeddings))
        self._cos_L1Q, self._sin_L1Q = (table.to(weights.device).unsqueeze(1) for table in (cos_LQ, sin_LQ))

    def __call__(self, places: Places, wanted: torch.Tensor) -> torch.Tensor:
        """Float32 logits of the wanted rows, on the device."""
        config, weights = self._config, self._weights
        rope = self._cos_L1Q.index_select(0, places.position_M), self._sin_L1Q.index_select(0, places.position_M)
        x_MD = weights["embed"].index_select(0, places.token_M)
        for layer in range(config.num_hidden_layers):
            path = f"layers.{layer}"
            normed_MD = self._norm(x_MD, f"{path}.input_norm", config.rms_norm_eps)
            attended_MX = self._attention(normed_MD, f"{path}.attention", layer, rope, places)
            x_MD = x_MD + self._linear(attended_MX, f"{path}.attention.o")
            x_MD = x_MD + self._feed(self._norm(x_MD, f"{path}.post_norm", config.rms_norm_eps), path, layer)
        x_MD = self._norm(x_MD.index_select(0, wanted), "norm", config.rms_norm_eps)
        return F.linear(x_MD, weights.head).to(torch.float32)

    # Attention

    def _grouped(self, x_MD: torch.Tensor, path: str, layer: int, rope: Rope, places: Places) -> torch.Tensor:
        config = self._config
        width, groups = config.head_dim, config.num_key_value_heads
        heads = self._linear(x_MD, f"{path}.qkv").view(len(x_MD), -1, width)
        q_MNH, k_MGH, v_MGH = torch.split(heads, [config.num_attention_heads, groups, groups], dim=1)
        if self._weights.get(f"{path}.q_norm") is not None:
            q_MNH = self._norm(q_MNH, f"{path}.q_norm", config.rms_norm_eps)
            k_MGH = self._norm(k_MGH, f"{path}.k_norm", config.rms_norm_eps)
        q_MNH, k_MGH = rotate(q_MNH, rope), rotate(k_MGH, rope)
        self._cache.write(layer, places.slot_M, torch.cat((k_MGH, v_MGH), dim=1).flatten(1))

        def parts(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            k, v = rows.view(*rows.shape[:-1], 2, groups, width).unbind(-3)
            return k.transpose(-3, -2), v.transpose(-3, -2)

        return self._attend(q_MNH, layer, places, parts).flatten(1)

    def _latent(self, x_MD: torch.Tensor, path: str, layer: int, rope: Rope, places: Places) -> torch.Tensor:
        config, weights = self._config, self._weights
        rank, nope, turned = config.kv_lora_rank, config.qk_nope_head_dim, config.qk_rope_head_dim
        q_MX, kv_MX = self._linear(x_MD, f"{path}.q_kv_down").tensor_split([-(rank + turned)], dim=1)
        if config.q_lora_rank is not None:
            q_MX = self._linear(self._norm(q_MX, f"{path}.q_norm", LATENT_NORM_EPS), f"{path}.q_up")
        q_MNH, q_MNP = torch.split(q_MX.view(len(x_MD), -1, nope + turned), [nope, turned], dim=-1)
        latent_MR, k_MP = torch.split(kv_MX, [rank, turned], dim=1)
        latent_MR = self._norm(latent_MR, f"{path}.kv_norm", LATENT_NORM_EPS)
        row_MW = torch.cat((latent_MR, rotate(k_MP.unsqueeze(1), rope).squeeze(1)), dim=1)
        self._cache.write(layer, places.slot_M, row_MW)
        # Into the latent space: q k = q (up latent) = (q up) latent.
        q_NMR = q_MNH.transpose(0, 1) @ weights[f"{path}.k_up_NHR"]
        q_MNW = torch.cat((q_NMR.transpose(0, 1), rotate(q_MNP, rope)), dim=-1)

        def parts(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            shared = rows.unsqueeze(-3)
            return shared, shared[..., :rank]

        latent_MNR = self._attend(q_MNW, layer, places, parts)
        return (latent_MNR.transpose(0, 1) @ weights[f"{path}.v_up_NRV"]).transpose(0, 1).flatten(1)

    def _attend(
        self,
        q_MNH: torch.Tensor,
        layer: int,
        places: Places,
        parts: Parts,
    ) -> torch.Tensor:
        """Every row attends to its sequence's tokens up to itself."""
        done = []
        if places.num_decoding:
            k_CGSH, v_CGSV = parts(self._cache.rows(layer, places.table_CB))
            mask_C1S = places.beyond_CS.unsqueeze(1)
            q_CNTH = q_MNH[: places.num_decoding].unsqueeze(2)
            done.append(self._softmax(q_CNTH, k_CGSH, v_CGSV, mask_C1S.unsqueeze(1).unsqueeze(1)).squeeze(2))
        for prompt in places.prompts:
            k_GSH, v_GSV = parts(self._cache.rows(layer, prompt.table)[: prompt.end])
            q_NTH = q_MNH[prompt.rows].transpose(0, 1)
            done.append(self._softmax(q_NTH, k_GSH, v_GSV, _future(prompt, q_MNH.device)).transpose(0, 1))
        return done[0] if len(done) == 1 else torch.cat(done)

    def _softmax(
        self, q_XNTH: torch.Tensor, k_XGSH: torch.Tensor, v_XGSV: torch.Tensor, hidden: torch.Tensor
    ) -> torch.Tensor:
        """Attention of ... N T rows, in float32; `hidden`, which broadcasts to ... G J T S, is not attended to."""
        wide = precise(q_XNTH.dtype)
        *lead, heads, new, width = q_XNTH.shape
        groups, tokens = k_XGSH.shape[-3:-1]
        # The heads of a group read the same keys: one product.
        q_XGYH = (q_XNTH.to(wide) * self._scale).reshape(*lead, groups, -1, width)
        scores_XGYS = q_XGYH @ k_XGSH.to(wide).mT
        scores_XGYS.view(*lead, groups, -1, new, tokens).masked_fill_(hidden, -torch.inf)
        out_XGYV = scores_XGYS.softmax(-1) @ v_XGSV.to(wide)
        return out_XGYV.view(*lead, heads, new, -1).to(q_XNTH.dtype)

    # Feed-forward

    def _feed(self, x_MD: torch.Tensor, path: str, layer: int) -> torch.Tensor:
        if not self._config.is_sparse(layer):
            return self._block(x_MD, f"{path}.mlp")
        return self._experts(x_MD, f"{path}.experts") + self._block(x_MD, f"{path}.shared")

    def _block(self, x_MD: torch.Tensor, path: str) -> torch.Tensor:
        gate, up = self._linear(x_MD, f"{path}.gate_up").chunk(2, dim=-1)
        return self._linear(F.silu(gate) * up, f"{path}.down")

    def _experts(self, x_MD: torch.Tensor, path: str) -> torch.Tensor:
        weights, router = self._weights, self._router
        assert router is not None
        logits_ME = F.linear(x_MD.to(torch.float32), weights[f"{path}.router"])
        scores_ME = logits_ME.sigmoid()
        chosen_MK = router.choose(scores_ME, weights[f"{path}.router_bias"])
        weights_MK = router.weigh(scores_ME, chosen_MK)
        row_P, place_MK, places = sort_by_expert(chosen_MK, router.num_experts)
        gate_PF, up_PF = grouped_linear(x_MD.index_select(0, row_P), weights[f"{path}.gate_up_EFD"], places).chunk(
            2, -1
        )
        weight_P = weights_MK.new_zeros(len(row_P)).scatter(0, place_MK.flatten(), weights_MK.flatten())
        h_PF = F.silu(gate_PF) * up_PF * weight_P.unsqueeze(-1).to(x_MD.dtype)
        out_PD = grouped_linear(h_PF, weights[f"{path}.down_EDF"], places)
        return out_PD.index_select(0, place_MK.flatten()).view(*place_MK.shape, -1).sum(1)

    # Small parts

    def _linear(self, x: torch.Tensor, path: str) -> torch.Tensor:
        return F.linear(x, self._weights[path], self._weights.get(f"{path}.bias"))

    def _norm(self, x: torch.Tensor, path: str, eps: float) -> torch.Tensor:
        weight = self._weights[path]
        return F.rms_norm(x.to(weight.dtype), weight.shape, weight, eps).to(x.dtype)


def _future(prompt: Prompt, device: torch.device) -> torch.Tensor:
    """T S: tokens after a row's own."""
    ones = torch.ones(prompt.end - prompt.start, prompt.end, dtype=torch.bool, device=device)
    return ones.triu(prompt.start + 1)
