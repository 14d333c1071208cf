"""Faults that nobody planted for the qualification, and sound chips with trained models: `qualify_foreign.py`."""
