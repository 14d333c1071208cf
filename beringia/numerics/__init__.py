"""Numbers and how far they may be apart: hashes of state, error metrics, derived tolerances."""
