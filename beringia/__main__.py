"""`python -m beringia` is `beringia`."""

from beringia.cli import main

main()
