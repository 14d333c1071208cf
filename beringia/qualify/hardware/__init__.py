"""Probes of a chip that need no model: memory, speed, collectives, and whether it stays right under load."""
