"""One decoder for Hugging Face checkpoints of the families in `families.py`, and for other combinations of parts.

Start in `decoder.py`; then `attention.py`, `experts.py`, `rope.py`. `config.py` has the flags; `presets.py` names
models without a directory, `hugging_face.py` reads and writes checkpoints, `filling.py` holds what is read,
`decoding.py` generates.
"""

from beringia.model.attention import fusing_attention
from beringia.model.cache import KeyValueCache
from beringia.model.config import DecoderConfig, RopeConfig
from beringia.model.decoder import (
    IGNORED,
    Decoder,
    Losses,
    Sums,
    Targets,
    cross_entropy_sum,
    update_router_biases,
)
from beringia.model.decoding import greedy, sample
from beringia.model.experts import forcing_routes, recording_routes
from beringia.model.filling import filled
from beringia.model.hugging_face import config_of, initialise, load_model, save_model
from beringia.model.hugging_face_directory import read_config
from beringia.model.hugging_face_names import checkpoint_tensors
from beringia.model.presets import PRESETS, preset

__all__ = [
    "IGNORED",
    "PRESETS",
    "Decoder",
    "DecoderConfig",
    "KeyValueCache",
    "Losses",
    "RopeConfig",
    "Sums",
    "Targets",
    "checkpoint_tensors",
    "config_of",
    "cross_entropy_sum",
    "filled",
    "forcing_routes",
    "fusing_attention",
    "greedy",
    "initialise",
    "load_model",
    "preset",
    "read_config",
    "recording_routes",
    "sample",
    "save_model",
    "update_router_biases",
]
