"""The one reading of a run: its events in order, and what they amount to.

`log` appends to `events.jsonl` and follows it, `fold` takes the events one after another, `situation` is what they
amount to for one role: which steps and checkpoints count, what is trusted, which chip is in use, what went wrong.
Whatever was abandoned is resolved there and nowhere else: decisions, summary, page and live view read it.

Decides nothing, draws nothing, and knows no chips.
"""
