"""Beringia carries a language model across the gap between accelerator vendors."""

from beringia.threads import prepare_threads

__version__ = "0.1.0"

# Before anything imports torch: OpenMP reads its settings once, when it is loaded.
prepare_threads()
