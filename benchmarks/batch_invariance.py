"""What the same bits in any company cost: tokens a second with and without. Prints one JSON object.

    python benchmarks/batch_invariance.py --json [--model r2-micro --requests 64 --tokens 64 --rounds 5]

Engines with torch's operators, plain and batch-invariant, and with compiled ones, which always are, take turns on the
CPU. Each is asked for the same greedy answers; then each batch-invariant one is asked for one of the requests alone,
and the bits of its log-probabilities are compared.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import statistics
import time
from datetime import date

import beringia  # noqa: F401  # sets the threads before torch loads

# isort: split
from beringia.chips.open import open_chip
from beringia.engine import Completion, Engine, Sampling
from beringia.machine.threads import usable_cores

PROMPT_TOKENS = 32
ENGINES = {"torch": ("torch", False), "torch, batch-invariant": ("torch", True), "compiled": ("compiled", True)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="one line")
    parser.add_argument("--model", default="r2-micro")
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    chip = open_chip("cpu")
    engines = {
        name: Engine(options.model, chip, operators=operators, batch_invariant=invariant)
        for name, (operators, invariant) in ENGINES.items()
    }
    drawn = random.Random(5)
    vocabulary = engines["torch"].config.vocab_size
    prompts = [[drawn.randrange(4, vocabulary) for _ in range(PROMPT_TOKENS)] for _ in range(options.requests)]
    sampling = Sampling(max_tokens=options.tokens, temperature=0.0, ignore_end=True, logprobs=0)
    rates: dict[str, list[float]] = {name: [] for name in engines}
    answers: dict[str, list[Completion]] = {}
    for number in range(options.rounds + 1):
        for name, engine in engines.items():
            began = time.perf_counter()
            answers[name] = engine.generate(prompts, sampling)
            if number:  # the first is slower
                rates[name].append(options.requests * options.tokens / (time.perf_counter() - began))
    alone = {name: engine.generate(prompts[-1:], sampling)[0] for name, engine in engines.items()}
    result = {
        "benchmark": "batch-invariance",
        "date": date.today().isoformat(),
        "machine": f"{platform.machine()}, {usable_cores()} cores",
        **{name: getattr(options, name) for name in ("model", "requests", "tokens", "rounds")},
        "tokens_a_second": {name: statistics.median(taken) for name, taken in rates.items()},
        "times_as_long_as_torch": {
            name: statistics.median(plain / own for plain, own in zip(rates["torch"], taken, strict=True))
            for name, taken in rates.items()
        },
        "same_bits_alone": {name: alone[name] == answers[name][-1] for name in engines},
    }
    result["holds"] = all(result["same_bits_alone"][name] for name, (_, invariant) in ENGINES.items() if invariant)
    print(json.dumps(result, indent=None if options.json else 2))


if __name__ == "__main__":
    main()
