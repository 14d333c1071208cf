"""Starting work on any machine: the one place where processes are started, spoken to, watched and ended.

Follow one start in this order: `command.py` (what is run and where), `launchers/` (how it gets there), `child.py` (as
its starter sees it), `protocol.py` (what the two say to each other), `far_end.py` (the process itself), `endings.py`
(how it and what it started are ended), `words.py` (how its death is told), `patience.py` (every time-out), `leaving.py`
(how the starter itself is left). `files/` moves files between two roots by hash. Imports no torch and knows no chips.
"""
