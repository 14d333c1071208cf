"""Files from one root to another, by hash: only what the receiver lacks travels, streamed, and appears complete or not
at all. `exchange.py` is what both sides do, `far.py` the far side, `remote.py` the starter's."""
