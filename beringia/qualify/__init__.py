"""Is a chip fit to train, to serve, or neither: evidence and a verdict."""
