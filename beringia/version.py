"""The version, apart from the public face, so that everything inside may read it."""

__version__ = "0.1.0"
