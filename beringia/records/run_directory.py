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
        """The recipe after `--set`, as canonical JSON with its hash, and the run's identity."""
        return self.root / "recipe.json"

    @property
    def earlier_recipes(self) -> list[Path]:
        """The recipes that the run went on with before this one, oldest first."""
        numbered = {int(path.stem.removeprefix("recipe-")): path for path in self.root.glob("recipe-[0-9]*.toml")}
        return [numbered[number] for number in sorted(numbered)]

    @property
    def identifier(self) -> Path:
        """A word of this directory's own, drawn when the run began: it says whose a root on another machine is."""
        return self.root / "run-id"

    @property
    def inputs(self) -> Path:
        """The files that model, data and tokenizer are made of: size, time and hash of each."""
        return self.root / "inputs.json"

    @property
    def events(self) -> Path:
        return self.root / "events.jsonl"

    @property
    def checkpoints(self) -> Path:
        return self.root / "checkpoints"

    @property
    def set_aside(self) -> Path:
        """What made room, and is kept for whoever wants it: checkpoints that cannot be loaded, `step-<step>-<epoch>`;
        exports with files of the user's own."""
        return self.root / "set-aside"

    @property
    def abandoned(self) -> Path:
        """Checkpoints behind which the run went back, `step-<step>-<epoch>`, until a later one is trusted."""
        return self.set_aside / "abandoned"

    @property
    def certificates(self) -> Path:
        """Signed certificates, `*.json`: which chips may train this run's model."""
        return self.root / "certificates"

    @property
    def data(self) -> Path:
        """Packed token shards and the tokenizer."""
        return self.root / "data"

    @property
    def model(self) -> Path:
        """The model that the run began with, where it was taken from another run: a Hugging Face directory."""
        return self.root / "model"

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
