"""Settings for every test."""

from hypothesis import settings

# Machines that run tests are noisy: how long one example takes says nothing about whether it holds.
settings.register_profile("beringia", deadline=None)
settings.load_profile("beringia")
