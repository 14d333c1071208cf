"""Training on one chip: the loop, the guard, the worker process around them."""
