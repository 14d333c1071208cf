"""Checkpoints: vendor-neutral, sharded, safetensors only, hashed, atomic, resharding. See `docs/checkpoints.md`.

Without torch, for the supervisor: `directory` (list, verify, trust, prune), `epoch` (who may publish). With torch, for
workers: `store` (`CheckpointStore`). This file imports nothing.
"""
