"""A chip's arithmetic by measurement: what goes in, what comes out, and nothing about what is inside."""
