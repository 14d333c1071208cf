"""Everything that is written to disk: recipe, events, manifest, identities. Imports nothing heavy (no torch)."""
