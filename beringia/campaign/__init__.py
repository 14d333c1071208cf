"""The whole story from one recipe: train under supervision, export, compare, report."""
