"""The decoder computes what transformers computes: logits and every parameter's gradient, in every family.

Two comparisons. In float64 both must agree to rounding. In float32 our distance from the float64 result must be no
larger than transformers' own, up to what another order of summation may cost.
"""

import importlib
from types import ModuleType
from typing import Any

import pytest
import torch
import transformers
from torch.nn import functional as F

from beringia.model import Decoder, load_model, save_model
from beringia.model.hugging_face_config import config_from_document, document_of

# Relative error of a float64 run: unit roundoff 2^-53 times 10^4, which stands for some 100 dependent operations, each
# a sum of about 100 terms, all rounding the same way.
FLOAT64_AGREEMENT = 1e4 * 2.0**-53
# Two float32 programs that sum in another order have errors of the same law, not the same error. Over a tensor of n
# elements the ratio of two such norms spreads by about 1 / sqrt(n); 3 covers the smallest tensors (n = 8).
FLOAT32_RATIO = 3.0
# Below a few unit roundoffs transformers' own error may be luck.
FLOAT32_FLOOR = 4 * 2.0**-24

SMALL = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 128,
    "initializer_range": 0.2,
}
LATENT = {
    "q_lora_rank": 24,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 12,
    "qk_rope_head_dim": 8,
    "v_head_dim": 10,
    "moe_intermediate_size": 20,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "n_group": 2,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "num_nextn_predict_layers": 0,
}
ROUTED = {"moe_intermediate_size": 20, "num_experts": 8, "num_experts_per_tok": 2, "head_dim": 8}
OF_FAMILY = {"deepseek_v3": LATENT, "qwen3_moe": ROUTED}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, "rope_theta": 10000.0}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "original_max_position_embeddings": 64,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "rope_theta": 500.0,
}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "deepseek_v3": ("deepseek_v3", {}),
    "deepseek_v3 without q_lora": ("deepseek_v3", {"q_lora_rank": None}),
    "deepseek_v3 with one group": ("deepseek_v3", {"n_group": 1, "topk_group": 1}),
    "deepseek_v3 with four groups of which two": ("deepseek_v3", {"n_group": 4, "topk_group": 2}),
    "deepseek_v3 all layers sparse": ("deepseek_v3", {"first_k_dense_replace": 0, "n_shared_experts": 2}),
    "deepseek_v3 all layers dense": ("deepseek_v3", {"first_k_dense_replace": 3}),
    "deepseek_v3 yarn": ("deepseek_v3", {"rope_parameters": {**YARN, "mscale": 0.8, "mscale_all_dim": 1.0}}),
    "deepseek_v3 yarn without mscale": ("deepseek_v3", {"rope_parameters": YARN}),
    "deepseek_v3 rotary halves": ("deepseek_v3", {"rope_interleave": False}),
    "deepseek_v3 weights not normalised": ("deepseek_v3", {"norm_topk_prob": False, "routed_scaling_factor": 1.7}),
    "deepseek_v3 biases": ("deepseek_v3", {"attention_bias": True}),
    "deepseek_v3 tied": ("deepseek_v3", {"tie_word_embeddings": True}),
    "llama": ("llama", {}),
    "llama grouped": ("llama", {"num_key_value_heads": 2, "tie_word_embeddings": True}),
    "llama llama3 rope": ("llama", {"rope_parameters": LLAMA3}),
    "llama linear rope": ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}}),
    "llama biases": ("llama", {"attention_bias": True, "mlp_bias": True, "head_dim": 6}),
    "qwen2": ("qwen2", {"num_key_value_heads": 1}),
    "qwen2 tied": ("qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("qwen3", {"num_key_value_heads": 2, "head_dim": 16}),
    "qwen3 yarn, biases": ("qwen3", {"attention_bias": True, "head_dim": 8, "rope_parameters": YARN}),
    "qwen3_moe": ("qwen3_moe", {"num_key_value_heads": 2, "norm_topk_prob": True}),
    "qwen3_moe weights not normalised": ("qwen3_moe", {"num_experts_per_tok": 3, "attention_bias": True}),
}


def reference(name: str) -> Any:
    """A transformers model of this case."""
    family, settings = CASES[name]
    return drawn(family, {**SMALL, **OF_FAMILY.get(family, {}), **settings}, sum(name.encode()))


def drawn(family: str, values: dict[str, Any], seed: int) -> Any:
    """A transformers model with weights that exercise every term (norms not one, biases not zero)."""
    torch.manual_seed(seed)
    config = transformers.AutoConfig.for_model(family, **values)
    config._experts_implementation = "eager"  # the only one that has float64
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
    with torch.no_grad():
        for parameter_name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if parameter_name.endswith("norm.weight"):
                tensor.normal_(1.0, 0.2)
            elif parameter_name.endswith("bias"):
                tensor.normal_(0.0, 0.1)
    return model


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    tokens = torch.randint(0, 61, (3, 41), generator=generator)
    labels = tokens[:, 1:].clone()
    labels[0, :7] = -100
    return tokens[:, :-1], labels


def gradients(model: torch.nn.Module, logits: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
    F.cross_entropy(logits.flatten(0, 1), labels.flatten()).backward()
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


def results(model: Any) -> dict[str, torch.Tensor]:
    """Logits and all gradients, in float64, of one forward and backward pass."""
    model.zero_grad()
    tokens, labels = batch()
    logits = model(tokens) if isinstance(model, Decoder) else model(tokens, use_cache=False).logits
    found = {"logits": logits, **gradients(model, logits, labels)}
    return {name: tensor.detach().double() for name, tensor in found.items()}


class Float64Torch(ModuleType):
    """`torch` for transformers' modeling file, whose norms and router otherwise stay in float32 in a float64 model."""

    float32 = torch.float64

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


def softmax_as_wide_as_its_input(x: torch.Tensor, dim: int, dtype: torch.dtype | None = None) -> torch.Tensor:
    """Qwen3-MoE's router asks for `torch.float`, which is also the format of all rotary tables."""
    return x.softmax(dim, dtype=x.dtype if x.dtype == torch.float64 else dtype)


def float64_results(model: Any, family: str, patch: pytest.MonkeyPatch) -> dict[str, torch.Tensor]:
    modeling = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
    with patch.context() as context:
        context.setattr(modeling, "torch", Float64Torch("torch"))
        context.setattr(F, "softmax", softmax_as_wide_as_its_input)
        return results(model.double())


def distance(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())


def assert_agreement(ours: Decoder, theirs: Any, family: str, patch: pytest.MonkeyPatch) -> None:
    """Of logits and gradients, in both formats; `ours` has the weights of `theirs`. Leaves both in float64."""
    theirs_32, ours_32 = results(theirs), results(ours)
    exact = float64_results(theirs, family, patch)
    ours.double().set_compute_dtype(torch.float64)
    ours_64 = results(ours)

    assert set(ours_32) == set(exact)
    for tensor, wanted in exact.items():
        assert distance(ours_64[tensor], wanted) <= FLOAT64_AGREEMENT, tensor
        allowed = FLOAT32_RATIO * distance(theirs_32[tensor], wanted) + FLOAT32_FLOOR
        assert distance(ours_32[tensor], wanted) <= allowed, tensor


@pytest.mark.parametrize("name", CASES)
def test_logits_and_gradients_agree_with_transformers(
    name: str, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    theirs = reference(name)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = load_model(tmp_path / "theirs")
    assert_agreement(ours, theirs, CASES[name][0], monkeypatch)


@pytest.mark.parametrize("name", CASES)
def test_transformers_reads_what_we_save(name: str, tmp_path: Any) -> None:
    theirs = reference(name)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = load_model(tmp_path / "theirs")
    save_model(ours, tmp_path / "ours")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours", experts_implementation="eager")
    wanted = theirs.state_dict()
    assert set(again.state_dict()) == set(wanted)
    for tensor, value in again.state_dict().items():
        assert torch.equal(value, wanted[tensor]), tensor
    tokens, _ = batch()
    assert torch.equal(again(tokens, use_cache=False).logits, theirs(tokens, use_cache=False).logits)
    assert config_from_document(document_of(ours.config)) == ours.config
