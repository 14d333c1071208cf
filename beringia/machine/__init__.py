"""The machine that this process runs on: threads, memory, the C compiler and other tools. Knows no chips, no torch."""
