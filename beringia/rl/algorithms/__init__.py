"""What a step of reinforcement learning minimises, one algorithm a file; `choose.py` has them by name."""
