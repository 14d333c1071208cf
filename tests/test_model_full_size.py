"""The published 671-billion-parameter model, by shapes alone."""

from collections import Counter

import torch

from beringia.model import Decoder, checkpoint_tensors, preset
from beringia.model.hugging_face import shared_copies

# DeepSeek-V3's FP8 checkpoint has 91 991 tensors, of which 45 808 are block scales.
TENSORS_PUBLISHED = 91_991 - 45_808


def full() -> Decoder:
    with torch.device("meta"):
        return Decoder(preset("deepseek-v3"))


def test_the_full_model_has_the_published_number_of_parameters() -> None:
    decoder = full()
    by_part: Counter[bool] = Counter()
    for name, parameter in decoder.named_parameters():
        by_part[name.startswith("model.layers.61.")] += parameter.numel()
    assert round(by_part[False] / 1e9, 1) == 671.0
    # The README says 11.5 B, which is the layer's attention and 257 experts; eh_proj (2 * 7168^2) comes on top.
    assert round((by_part[True] - 2 * 7168**2) / 1e9, 1) == 11.5


def test_the_full_model_has_the_published_tensors() -> None:
    decoder = full()
    tensors = dict(checkpoint_tensors(decoder)) | shared_copies(decoder)
    assert len(tensors) == TENSORS_PUBLISHED
    shapes = {name: list(tensor.shape) for name, tensor in tensors.items()}
    assert shapes["model.layers.0.self_attn.kv_a_proj_with_mqa.weight"] == [576, 7168]
    assert shapes["model.layers.2.mlp.down_proj.weight"] == [7168, 18432]
    assert shapes["model.layers.60.mlp.experts.255.gate_proj.weight"] == [2048, 7168]
    assert shapes["model.layers.61.eh_proj.weight"] == [7168, 14336]
    assert shapes["model.layers.61.shared_head.head.weight"] == [129280, 7168]
    assert shapes["model.layers.3.mlp.gate.e_score_correction_bias"] == [256]
