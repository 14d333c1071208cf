"""The command line: `beringia <verb> ...`. Parses first, imports what is heavy after.

Every verb takes `--json`: one JSON object on standard output and nothing else there, errors too. Exit codes: 0 done,
1 our fault, 2 the input is wrong, 3 a negative verdict or a run given up, 4 inconclusive, 128 + n stopped by signal n.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from beringia import __version__
from beringia.errors import BeringiaError, Inconclusive, RecipeError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from beringia.chips.arithmetic.profile import MatrixUnit
    from beringia.records.recipe import Recipe
    from beringia.records.run_directory import RunDirectory

_LOG_COLUMNS = 100

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

RecipeArgument = Annotated[Path, typer.Argument(help="A recipe (TOML).", show_default=False)]
RunArgument = Annotated[Path, typer.Argument(help="A run directory.", show_default=False)]
JsonOption = Annotated[bool, typer.Option("--json", help="One JSON object on standard output.")]
SetOption = Annotated[
    list[str] | None, typer.Option("--set", help="Change a value of the recipe: train.steps=100.", show_default=False)
]
OutOption = Annotated[
    Path | None, typer.Option("--out", help="Run directory; default runs/<name>.", show_default=False)
]


def _print_version(asked: bool) -> None:
    if asked:
        print(f"beringia {__version__}")
        raise typer.Exit()


@app.callback()
def beringia(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    """Carries a language model across the gap between accelerator vendors."""


@app.command()
def campaign(
    recipe: RecipeArgument, change: SetOption = None, out: OutOption = None, as_json: JsonOption = False
) -> None:
    """All of it: train with crossings as needed, export, compare with transformers, report."""
    parsed, run = _read(recipe, change, out)
    from beringia.campaign.story import run_campaign
    from beringia.report.summary import print_table

    with _progress(parsed) as on_event:
        summary = run_campaign(parsed, recipe.read_text(), run, on_event=on_event)
    if as_json:
        print(summary.model_dump_json())
    else:
        print_table(summary, _console())
    _exit_if_stopped(summary.status, summary.message)


@app.command()
def train(recipe: RecipeArgument, change: SetOption = None, out: OutOption = None, as_json: JsonOption = False) -> None:
    """One supervised training run."""
    parsed, run = _read(recipe, change, out)
    from beringia.report.history import read_history
    from beringia.report.page import write_report
    from beringia.report.summary import print_table, summarise
    from beringia.supervise.supervisor import supervise

    try:
        with _progress(parsed) as on_event:
            supervise(parsed, recipe.read_text(), run, on_event=on_event)
    finally:
        if run.events.exists():
            write_report(run.root)
    summary = summarise(read_history(run.root))
    if as_json:
        print(summary.model_dump_json())
    else:
        print_table(summary, _console())
    _exit_if_stopped(summary.status, summary.message)


@app.command()
def export(
    run: RunArgument,
    to: Annotated[Path, typer.Option("--to", help="Directory to write.", show_default=False)],
    step: Annotated[int | None, typer.Option(help="Checkpoint; default the newest.", show_default=False)] = None,
    as_json: JsonOption = False,
) -> None:
    """Write a run's model as a Hugging Face checkpoint."""
    from beringia.campaign.export import export as write_export
    from beringia.records.run_directory import RunDirectory

    written = write_export(RunDirectory(run), to, step)
    _answer(as_json, {"step": written, "directory": str(to)}, f"step {written} written to {to}")


@app.command()
def report(run: RunArgument, as_json: JsonOption = False) -> None:
    """Write a run's page from its directory alone."""
    from beringia.report.page import write_report

    path = write_report(run)
    _answer(as_json, {"report": str(path)}, str(path))


chips_app = typer.Typer(help="Which chips are here, and what their arithmetic is.")
app.add_typer(chips_app, name="chips")


@chips_app.command()
def probe(
    chip: Annotated[str, typer.Argument(help="A chip, as `beringia chips` calls it.")],
    out: Annotated[Path, typer.Option(help="where the profile goes, a TOML file")],
    as_json: JsonOption = False,
) -> int:
    """Measure a chip's arithmetic into a profile that the emulator loads: emulated:PATH@exact."""
    from beringia.chips.open import open_chip
    from beringia.qualify.arithmetic.chip_profile import measure_profile, to_toml
    from beringia.records.files import write_text

    opened = open_chip(chip)
    try:
        profile = measure_profile(opened)
    finally:
        opened.close()
    write_text(out, to_toml(profile))
    assumed = profile.assumed()
    if as_json:
        print(json.dumps({"chip": opened.name, "profile": str(out), "hash": profile.hash, "assumed": assumed}))
    else:
        _show_units({str(name): unit for name, unit in profile.units.items()}, out)
    return Inconclusive.exit_code if any(name != "units.float64" for name in assumed) else 0


def _show_units(units: Mapping[str, MatrixUnit], out: Path) -> None:
    from rich.table import Table

    table = Table("operands", "unit", "", box=None, pad_edge=False)
    for name, unit in units.items():
        table.add_row(name, unit.in_words(), unit.mark)
    console = _console()
    console.print(table)
    console.print(str(out), soft_wrap=True)


@chips_app.callback(invoke_without_command=True)
def chips(context: typer.Context, as_json: JsonOption = False) -> None:
    """Which chips are here."""
    if context.invoked_subcommand is not None:
        return
    from beringia.chips.open import survey

    found = survey()
    if as_json:
        print(json.dumps({"chips": [vars(one) for one in found]}))
        return
    from rich.table import Table

    table = Table("chip", "part", "", "here", "state", box=None, pad_edge=False)
    for one in found:
        table.add_row(one.name, one.sku, one.truth, "yes" if one.here else "no", one.state)
    _console().print(table)


def main(arguments: list[str] | None = None) -> None:
    """Entry point: runs a verb, turns our errors into a sentence and an exit code."""
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        status = app(arguments, standalone_mode=False)
        sys.exit(status if isinstance(status, int) else 0)
    except typer.Exit as done:
        sys.exit(done.exit_code)
    except BeringiaError as error:
        _explain(str(error), type(error).__name__, "--json" in arguments)
        sys.exit(error.exit_code)
    except typer.Abort:
        sys.exit(130)
    except Exception as error:
        if not hasattr(error, "format_message"):  # not one of click's usage errors: a bug, with its traceback
            raise
        if error.format_message():  # empty where no verb was given: typer has shown the help then
            _explain(error.format_message(), type(error).__name__, "--json" in arguments)
        sys.exit(2)


def _read(recipe: Path, change: list[str] | None, out: Path | None) -> tuple[Recipe, RunDirectory]:
    from beringia.records.recipe import read_recipe
    from beringia.records.run_directory import RunDirectory

    parsed = read_recipe(recipe, dict(_change(one) for one in change or []))
    return parsed, RunDirectory(out or Path("runs") / parsed.name)


def _change(text: str) -> tuple[str, Any]:
    import tomllib

    key, separator, value = text.partition("=")
    if not separator:
        raise RecipeError(f"--set {text}: write key=value, for instance --set train.steps=100.")
    try:
        return key.strip(), tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError:
        return key.strip(), value.strip()  # a bare word is a string


def _answer(as_json: bool, document: dict[str, Any], sentence: str) -> None:
    print(json.dumps(document) if as_json else sentence)


def _explain(sentence: str, kind: str, as_json: bool) -> None:
    if as_json:
        print(json.dumps({"error": kind, "message": sentence}))
    else:
        print(f"beringia: {sentence}", file=sys.stderr)


def _exit_if_stopped(status: str, message: str) -> None:
    if status == "stopped":
        signal_number = re.search(r"signal (\d+)", message)
        raise typer.Exit(128 + int(signal_number[1]) if signal_number else 1)


def _console() -> Any:
    from rich.console import Console

    # Where nobody watches there is no width to ask for: the tables are made for this many columns.
    return Console() if sys.stdout.isatty() else Console(width=_LOG_COLUMNS)


def _progress(recipe: Recipe) -> Any:
    from beringia.progress import showing_progress

    return showing_progress(recipe)


if __name__ == "__main__":
    main()
