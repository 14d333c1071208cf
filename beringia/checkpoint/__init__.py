"""Checkpoints: vendor-neutral, sharded, safetensors only, hashed, atomic, resharding. See `docs/checkpoints.md`.

Without torch, for the supervisor: `directory` (list, verify, trust, prune), `epoch` (who may publish). With torch:
`store` (`CheckpointStore`) for workers, `reader` (a tensor at a time) for whoever wants the weights. This file imports
nothing.
"""
