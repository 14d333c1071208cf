"""Rotary settings: whatever a config says of them is computed as transformers computes it, or refused."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from test_model_parity import LATENT, SMALL
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.deepseek_v3.modeling_deepseek_v3 import yarn_apply_mscale
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from beringia.errors import ModelError
from beringia.model import rope
from beringia.model.hugging_face_config import config_from_document, document_of
from beringia.model.hugging_face_rope import _KINDS, _NULL

# Both compute in float32 by the same formulas; powers and logarithms of two libraries differ by a few units in the
# last place.
FREQUENCIES = 16 * 2.0**-24

numbers = st.sampled_from([0.5, 1, 1.0, 2.0, 4, 32.0, 1e4])
TABLE = {
    "factor": st.one_of(st.none(), numbers),
    "original_max_position_embeddings": st.one_of(st.none(), st.sampled_from([16, 64, 4096])),
    "low_freq_factor": numbers,
    "high_freq_factor": numbers,
    "beta_fast": st.one_of(st.none(), st.sampled_from([0, 8, 32.0])),
    "beta_slow": st.one_of(st.none(), st.sampled_from([0, 1, 2.0])),
    "mscale": st.one_of(st.none(), st.sampled_from([0, 0.7, 1.0])),
    "mscale_all_dim": st.one_of(st.none(), st.sampled_from([0, 0.7, 1])),
    "attention_factor": st.one_of(st.none(), st.sampled_from([0.0, 1.5])),
    "truncate": st.one_of(st.none(), st.booleans()),
    "rope_theta": st.one_of(st.none(), st.sampled_from([100.0, 10000, 1e6])),
    "partial_rotary_factor": st.sampled_from([None, 0.5, 1.0, 1]),
    "finetuned": st.booleans(),
    "short_factor": st.just([1.0] * 4),
    "long_factor": st.just([2.0] * 4),
}
KINDS = ["default", "linear", "llama3", "yarn", *sorted(ROPE_INIT_FUNCTIONS)]


@st.composite
def tables(draw: Any) -> dict[str, Any]:
    kind = draw(st.sampled_from(KINDS))
    spelling = draw(st.sampled_from([("type",), ("rope_type",), ("type", "rope_type"), ()]))
    needed, allowed = _KINDS.get(kind, (("factor",), ()))
    names = [name for name in (*needed, *allowed) if draw(st.integers(0, 4))]
    names += draw(st.lists(st.sampled_from(sorted(TABLE)), max_size=1))
    return {name: kind for name in spelling} | {name: draw(TABLE[name]) for name in names}


OUTSIDE = {
    "rope_theta": st.sampled_from([100.0, 10000, 1e6]),
    "original_max_position_embeddings": st.sampled_from([16, 64, 4096]),
    "partial_rotary_factor": st.sampled_from([None, 1.0, 0.5]),
    "max_position_embeddings": st.sampled_from([64, 128, 4096]),
    "rope_scaling": st.one_of(st.none(), st.just({}), tables(), tables()),
    "rope_parameters": st.one_of(st.none(), st.just({}), tables(), tables()),
}


@st.composite
def documents(draw: Any) -> dict[str, Any]:
    family = draw(st.sampled_from(["llama", "qwen3", "deepseek_v3"]))
    sizes = {**SMALL, **(LATENT if family == "deepseek_v3" else {"head_dim": 8}), "model_type": family}
    names = [name for name in OUTSIDE if draw(st.booleans())]
    return sizes | {name: draw(OUTSIDE[name]) for name in names}


def of_transformers(document: dict[str, Any]) -> tuple[torch.Tensor, float, float] | None:
    """Frequencies, what cos and sin are multiplied by, and what scores are; where transformers makes any of them."""
    try:
        config = transformers.AutoConfig.for_model(**copy.deepcopy(document))
        embedding = LlamaRotaryEmbedding(config)
        width = document.get("qk_nope_head_dim", 0) + 8
        scale = width**-0.5
        if document["model_type"] == "deepseek_v3":
            scale = yarn_apply_mscale(config.rope_parameters, scale)
    except Exception:  # it refuses settings with classes of several libraries: there is nothing to compare with
        return None
    return embedding.inv_freq, embedding.attention_scaling, scale


def ours(document: dict[str, Any]) -> tuple[torch.Tensor, float, float]:
    config = config_from_document(document)
    return rope.frequencies(config), rope.table_scale(config.rope), rope.softmax_scale(config)


@settings(max_examples=600, deadline=None)
@given(document=documents())
def test_any_rotary_settings_are_those_of_transformers_or_refused(document: dict[str, Any]) -> None:
    try:
        frequencies, table_scale, softmax_scale = ours(document)
    except ModelError:
        return
    theirs = of_transformers(document)
    if theirs is None:  # a factor that is null with deepseek_v3's mscale_all_dim, which fails there
        return
    torch.testing.assert_close(frequencies, theirs[0], rtol=FREQUENCIES, atol=0, equal_nan=False)
    assert table_scale == pytest.approx(theirs[1], rel=1e-12)
    assert softmax_scale == pytest.approx(theirs[2], rel=1e-12)
    config = config_from_document(document)
    assert config_from_document(document_of(config)) == config


@settings(max_examples=60, deadline=None)
@given(rope=tables(), spelling=st.sampled_from(["rope_scaling", "rope_parameters"]))
def test_what_is_refused_of_a_single_table_names_the_table(rope: dict[str, Any], spelling: str) -> None:
    document = {**SMALL, "model_type": "llama", spelling: rope}
    try:
        config_from_document(document)
    except ModelError as error:
        assert spelling in str(error) or "partial_rotary_factor" in str(error)


@pytest.mark.parametrize("kind", sorted({*ROPE_INIT_FUNCTIONS, "axial", "mrope", "su"} - _KINDS.keys()))
def test_a_kind_that_is_not_computed_here_is_refused_by_name(kind: str) -> None:
    with pytest.raises(ModelError, match=f"rope_scaling asks for rotary scaling '{kind}'"):
        config_from_document({**SMALL, "model_type": "llama", "rope_scaling": {"type": kind, "factor": 2.0}})


@pytest.mark.parametrize(("kind", "missing"), [(kind, name) for kind, (needed, _) in _KINDS.items() for name in needed])
def test_a_setting_that_a_kind_needs_is_never_filled_in(kind: str, missing: str) -> None:
    whole = {"rope_type": kind, "factor": 2.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    table = {name: whole[name] for name in ("rope_type", *_KINDS[kind][0]) if name != missing}
    with pytest.raises(ModelError, match=f"rope_parameters lacks {missing}"):
        config_from_document({**SMALL, "model_type": "llama", "rope_parameters": table})


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "deepseek_v3"])
def test_yarn_that_is_added_to_a_new_file_in_the_old_spelling_is_read(family: str) -> None:
    sizes = {**SMALL, **(LATENT if family == "deepseek_v3" else {"head_dim": 8}), "model_type": family}
    new = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}
    yarn = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
    assert config_from_document(sizes | new | {"rope_scaling": yarn}).rope.kind == "yarn"


def test_a_base_that_the_other_spelling_would_lose_is_refused() -> None:
    new = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}
    yarn = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
    document = {**SMALL, "model_type": "llama", **new, "rope_scaling": yarn}
    with pytest.raises(ModelError, match="rope_scaling beside rope_parameters, and they differ in rope_theta"):
        config_from_document(document)
    assert config_from_document(document | {"rope_theta": 1e6}).rope.theta == 1e6


@pytest.mark.parametrize(
    ("scaling", "positions"),
    [
        (None, 128),
        ({"type": "linear", "factor": 4.0}, 512),
        ({"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}, 512),
        ({"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}, 128),
        ({"type": "yarn", "factor": 4.0}, 512),
        ({"type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}, 128),
    ],
)
def test_a_model_has_as_many_positions_as_its_scaling_makes_of_them(
    scaling: dict[str, Any] | None, positions: int
) -> None:
    config = config_from_document({**SMALL, "model_type": "llama", "rope_scaling": scaling})
    assert config.context_tokens == positions
    assert config_from_document(document_of(config)).context_tokens == positions


# Widths at which a bound that is rounded, or not, moves several pairs.
WIDE = {**SMALL, "model_type": "llama", "head_dim": 64, "max_position_embeddings": 256}
YARN = {
    "rope_type": "yarn",
    "factor": 4.0,
    "original_max_position_embeddings": 64,
    "beta_fast": 8.0,
    "beta_slow": 2.0,
    "mscale": 0.7,
    "mscale_all_dim": 1.0,
    "attention_factor": 1.5,
    "truncate": True,
}


@pytest.mark.parametrize(
    ("name", "value"),
    [(name, None) for name in _NULL] + [("beta_fast", 0), ("beta_slow", 0), ("truncate", False), ("mscale", 0)],
)
@pytest.mark.parametrize("without", [{}, {"attention_factor": None}])
def test_null_and_nought_mean_to_yarn_what_they_mean_to_transformers(
    name: str, value: Any, without: dict[str, None]
) -> None:
    document = {**WIDE, "rope_parameters": {**YARN, **without, name: value}}
    found, wanted = ours(document), of_transformers(document)
    assert wanted is not None
    torch.testing.assert_close(found[0], wanted[0], rtol=FREQUENCIES, atol=0)
    assert found[1] == pytest.approx(wanted[1], rel=1e-12)
