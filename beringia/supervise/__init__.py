"""Starts workers, watches them, decides, crosses. Vendor-free: imports no torch."""
