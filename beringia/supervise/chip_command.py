"""What the recipe says of reaching a chip, as a command."""

from __future__ import annotations

from pathlib import Path

from beringia.processes.command import Command
from beringia.processes.patience import Patience
from beringia.records.recipe import ChipSection, SuperviseSection
from beringia.records.run_directory import RunDirectory


def chip_command(label: str, chip: ChipSection, module: str = "", run: RunDirectory | None = None) -> Command:
    """The command that runs a module where this chip is, for a run (whose its root is then)."""
    owner = run.identifier.read_text().strip() if run is not None and run.identifier.exists() else None
    return Command(
        name=f"chips.{label}",
        module=module,
        python=chip.python,
        launch=chip.launch,
        launcher=chip.launcher,
        root=chip.root,
        owner=owner,
    )


def patience_of(limits: SuperviseSection) -> Patience:
    """As the recipe says."""
    return Patience(start_seconds=limits.start_seconds, silence_seconds=limits.hang_seconds)


def root_of(chip: ChipSection, shared: Path) -> Path:
    """A directory of ours as the chip's machine sees it."""
    return shared.resolve() if chip.root is None else Path(chip.root)
