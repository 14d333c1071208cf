"""A run directory becomes a page, a table and one JSON object. Reads records only; needs no live process."""
