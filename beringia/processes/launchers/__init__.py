"""How a command gets to where it runs: one file a launcher, found by its name.

A file of this folder with `check(command)` and `argv(command)` (`processes/command.py: Launcher` is the contract) is a
launcher, and `launcher = "its-name"` of a chip chooses it.
"""
