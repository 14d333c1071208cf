"""Where everything of one run lies. Paths only; nothing is created here."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class RunDirectory:
    """`runs/<name>` and what is in it."""

    root: Path

    @property
    def recipe(self) -> Path:
        """The recipe as it was given, resolved to JSON by the supervisor: what workers read."""
        return self.root / "recipe.toml"

    @property
    def resolved_recipe(self) -> Path:
        """The recipe after `--set`, as canonical JSON with its hash."""
        return self.root / "recipe.json"

    @property
    def events(self) -> Path:
        return self.root / "events.jsonl"

    @property
    def checkpoints(self) -> Path:
        return self.root / "checkpoints"

    @property
    def certificates(self) -> Path:
        """Signed certificates, `*.json`: which chips may train this run's model."""
        return self.root / "certificates"

    @property
    def data(self) -> Path:
        """Packed token shards and the tokenizer."""
        return self.root / "data"

    @property
    def compiled(self) -> Path:
        """What torch.compile made on this machine."""
        return self.root / "compiled"

    @property
    def logs(self) -> Path:
        """Standard error of each worker, and stacks after a hang."""
        return self.root / "logs"

    @property
    def lock(self) -> Path:
        """Held by the supervisor while it lives."""
        return self.root / "lock"

    @property
    def epoch(self) -> Path:
        """The number of the supervisor that may publish."""
        return self.root / "epoch"

    @property
    def export(self) -> Path:
        """The Hugging Face checkpoint."""
        return self.root / "export"

    @property
    def answers(self) -> Path:
        """What the exported model answered on the inference chip."""
        return self.root / "answers"

    @property
    def report(self) -> Path:
        return self.root / "report.html"

    def rank_report(self, epoch: int, rank: int) -> Path:
        """Events of another rank's worker, on their way to the supervisor."""
        return self.root / "ranks" / f"{epoch}-{rank}.jsonl"

    def chip_memory(self, label: str) -> Path:
        """What an emulated chip remembers across processes (which one-time faults have struck)."""
        return self.root / "chips" / f"{label}.json"
