"""The command line: `beringia <verb> ...`. Parses first, imports what is heavy after.

Every verb takes `--json`: one JSON object on standard output and nothing else there, errors too. Exit codes: 0 done,
1 our fault, 2 the input is wrong, 3 a negative verdict or a run given up, 4 inconclusive, 128 + n stopped by signal n.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from beringia.errors import BeringiaError, Inconclusive, InputError, RecipeError
from beringia.processes.leaving import leaving_on_signals
from beringia.version import __version__

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from beringia.chips.arithmetic.profile import MatrixUnit
    from beringia.records.recipe import Recipe
    from beringia.records.run_directory import RunDirectory
    from beringia.report.summary import Summary

_LOG_COLUMNS = 100

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)

RecipeArgument = Annotated[
    str,
    typer.Argument(
        help="A recipe: the path of a TOML file, or a name that `beringia recipes` lists.", show_default=False
    ),
]
RunArgument = Annotated[Path, typer.Argument(help="A run directory.", show_default=False)]
JsonOption = Annotated[bool, typer.Option("--json", help="One JSON object on standard output.")]
SetOption = Annotated[
    list[str] | None,
    typer.Option(
        "--set", help="Change a value of the recipe: train.steps=100; without a value it is unset.", show_default=False
    ),
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
    parsed, text, run = _read(recipe, change, out)
    from beringia.campaign.story import run_campaign

    with _progress(parsed) as on_event:
        summary = run_campaign(parsed, text, run, on_event=on_event, say=_stages())
    _print_summary(summary, as_json)
    _exit_if_stopped(summary.status, summary.signal)


@app.command()
def train(
    recipe: RecipeArgument,
    change: SetOption = None,
    out: OutOption = None,
    candidate: Annotated[
        list[str] | None,
        typer.Option("--qualify", help="Label of a chip to qualify while the run trains.", show_default=False),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """One supervised training run."""
    parsed, text, run = _read(recipe, change, out)
    from beringia.campaign.candidate_role import candidates
    from beringia.report.history import read_history
    from beringia.report.page import write_report
    from beringia.report.summary import summarise
    from beringia.supervise.supervisor import supervise

    try:
        with _progress(parsed) as on_event:
            beside = candidates(parsed, candidate or [])
            finished = supervise(parsed, text, run, on_event=on_event, beside=beside)
    finally:
        if run.events.exists():
            write_report(run.root)
    summary = summarise(read_history(run.root))
    _print_summary(summary, as_json)
    _exit_if_stopped(finished.status, finished.signal)


@app.command()
def export(
    run: RunArgument,
    to: Annotated[Path, typer.Option("--to", help="Directory to write.", show_default=False)],
    step: Annotated[int | None, typer.Option(help="Checkpoint; default the newest.", show_default=False)] = None,
    dtype: Annotated[
        Literal["float32", "bf16", "bfloat16"], typer.Option(help="How weights are stored; bf16 is bfloat16.")
    ] = "float32",
    as_json: JsonOption = False,
) -> None:
    """Write a run's model as a Hugging Face checkpoint."""
    from beringia.campaign.export import export as write_export
    from beringia.records.run_directory import RunDirectory

    written = write_export(RunDirectory(run), to, step, dtype)
    _answer(as_json, {"step": written, "directory": str(to)}, f"step {written} written to {to}")


@app.command()
def report(run: RunArgument, as_json: JsonOption = False) -> None:
    """Write a run's page from its directory alone."""
    from beringia.report.page import write_report

    path = write_report(run)
    _answer(as_json, {"report": str(path)}, str(path))


@app.command()
def status(run: RunArgument, as_json: JsonOption = False) -> None:
    """How a run stands, in a line: step, loss, tokens a second, time left, or why it ended."""
    from beringia.records.run_directory import RunDirectory
    from beringia.report.status import status_of

    found = status_of(RunDirectory(run))
    _answer(as_json, found.model_dump(mode="json"), found.line())


ChipArgument = Annotated[str, typer.Argument(help="A chip, as `beringia chips` calls it.", show_default=False)]
ModelOption = Annotated[str, typer.Option("--model", help="A preset or a Hugging Face directory.", show_default=False)]
LayersOption = Annotated[
    int | None, typer.Option("--layers", help="Only so many of the model's layers.", show_default=False)
]
VocabularyOption = Annotated[
    int | None,
    typer.Option(
        "--vocabulary", min=1, help="A preset with so many tokens, as a run's tokenizer has.", show_default=False
    ),
]
DtypeOption = Annotated[
    str | None, typer.Option("--dtype", help="Dtype of products; default the chip's own.", show_default=False)
]
SeedOption = Annotated[int, typer.Option("--seed", help="Of random weights and data.")]
ExtentOption = Annotated[
    Literal["quick", "whole"],
    typer.Option("--extent", help="Ways of serving and training to try: a subset that covers them, or all."),
]
BatchesOption = Annotated[int, typer.Option("--batches", min=1, help="Batches, and training steps, compared.")]


@app.command()
def reference(
    chip: ChipArgument,
    model: ModelOption,
    out: Annotated[Path, typer.Option("--out", help="Bundle to write.", show_default=False)],
    dtype: DtypeOption = None,
    layers: LayersOption = None,
    vocabulary: VocabularyOption = None,
    seed: SeedOption = 0,
    batches: BatchesOption = 6,
    extent: ExtentOption = "quick",
    limit: Annotated[int, typer.Option(help="MiB that captured arguments may take.")] = 64,
    key: Annotated[Path | None, typer.Option(help="Private key to sign with.", show_default=False)] = None,
    as_json: JsonOption = False,
) -> None:
    """Record on one machine what another machine's chip is compared with. A chip that is not sound is refused."""
    from beringia.qualify.qualification import Request, record_reference
    from beringia.records.model_source import vocabulary_of

    request = Request(
        chip,
        model,
        seed=seed,
        layers=layers,
        vocabulary_size=vocabulary_of(model, vocabulary),
        compute_dtype=dtype,
        batches=batches,
        steps=batches,
        extent=extent,
        key=key,
    )
    signed = record_reference(request, out, limit * 2**20, _stages())
    manifest = signed.record
    document = {
        "bundle": str(out),
        "bytes": out.stat().st_size,
        "calls": len(manifest.calls),
        "calls_left_out": manifest.calls_left_out,
        "compute_dtype": manifest.compute_dtype,
        "public_key": signed.public_key,
    }
    left_out = f", {manifest.calls_left_out} did not fit" if manifest.calls_left_out else ""
    whose = "" if dtype else f", {chip}'s own: only what computes in it can be compared (--dtype chooses another)"
    lines = (
        f"in {manifest.compute_dtype}{whose}",
        f"{len(manifest.calls)} calls{left_out}; {out.stat().st_size / 2**20:.1f} MiB",
        f"signed by {signed.public_key}: on another machine give it as --trusted-key",
        str(out),
    )
    _answer(as_json, document, "\n".join(lines))


@app.command()
def qualify(
    chip: ChipArgument,
    model: ModelOption,
    against: Annotated[
        Path | None,
        typer.Option(help="Bundle from another machine; default: recorded here on the CPU.", show_default=False),
    ] = None,
    out: Annotated[Path, typer.Option("--out", help="Directory for certificate and page.")] = Path("certificates"),
    use: Annotated[
        Literal["train", "infer"], typer.Option("--for", help="What the exit code is about: train or infer.")
    ] = "train",
    trusted_key: Annotated[
        list[str] | None,
        typer.Option(
            "--trusted-key",
            help="Public key, in hex, of who may have signed the bundle; default: this machine's.",
            show_default=False,
        ),
    ] = None,
    dtype: DtypeOption = None,
    layers: LayersOption = None,
    vocabulary: VocabularyOption = None,
    seed: Annotated[int | None, typer.Option(help="Of random weights and data; default 0.", show_default=False)] = None,
    batches: Annotated[
        int | None, typer.Option(min=1, help="Batches, and training steps, compared; default 6.", show_default=False)
    ] = None,
    extent: Annotated[
        Literal["quick", "whole"] | None,
        typer.Option(
            help="Ways of serving and training to try: all, or a subset that covers them (quick, the default).",
            show_default=False,
        ),
    ] = None,
    ranks: Annotated[
        int | None,
        typer.Option(
            min=2,
            max=32,
            help="Devices that collectives are tried on; default 2, of the whole extent 4.",
            show_default=False,
        ),
    ] = None,
    faults: Annotated[str | None, typer.Option(help="Emulated chips only: a fault script.", show_default=False)] = None,
    soak: Annotated[float, typer.Option(help="Seconds of repeats under load.")] = 0.0,
    memory: Annotated[int, typer.Option(help="MiB of memory to test.")] = 16,
    speed: Annotated[bool, typer.Option(help="Measure rates, too.")] = False,
    key: Annotated[Path | None, typer.Option(help="Private key to sign with.", show_default=False)] = None,
    as_json: JsonOption = False,
) -> int:
    """Is a chip fit to train a model, to serve it, or neither: evidence, a verdict, the first wrong operator."""
    from beringia.qualify.issue import exit_code, issue
    from beringia.qualify.qualification import Request
    from beringia.qualify.qualification import qualify as make_certificate
    from beringia.records.command_line import command_line
    from beringia.records.model_source import vocabulary_of
    from beringia.records.signature import parse_public_key

    asked = {"compute_dtype": dtype, "layers": layers, "seed": seed, "batches": batches, "extent": extent}
    given: dict[str, str | int | None] = {name: value for name, value in asked.items() if value is not None}
    if vocabulary is not None:
        given["vocabulary_size"] = vocabulary_of(model, vocabulary)
    if against is None and trusted_key:
        raise InputError("--trusted-key is for a bundle from another machine: name it with --against, or leave it out.")
    request = Request(
        chip,
        model,
        faults=faults,
        ranks=ranks,
        steps=batches or Request.steps,
        soak_seconds=soak,
        memory_bytes=memory * 2**20,
        speed=speed,
        key=key,
        trusted_keys=tuple(map(parse_public_key, trusted_key or ())),
        given=frozenset(given),
        **given,  # type: ignore[arg-type]  # options of the fields' types
    )
    certificate = make_certificate(request, against, _stages())
    certificate = certificate.model_copy(update={"command": command_line()})
    written = issue(certificate, out, key, dtype_asked=dtype is not None)
    from beringia.report.certificate import print_certificate, write_certificate_page, write_junit

    write_certificate_page(written.signed, Path(written.paths["page"]))
    write_junit(certificate, Path(written.paths["junit"]))
    if as_json:
        print(json.dumps(written.paths | {"certificate": certificate.model_dump(mode="json")}))
    else:
        print_certificate(certificate, _console())
        print(written.paths["page"])
    return exit_code(certificate, use)


@app.command()
def serve(
    model: Annotated[str, typer.Argument(help="A Hugging Face directory or a preset.", show_default=False)],
    chip: Annotated[str, typer.Option(help="As `beringia chips` lists them, or auto.")] = "auto",
    faults: Annotated[str | None, typer.Option(help="Emulated chips only: a fault script.", show_default=False)] = None,
    dtype: DtypeOption = None,
    operators: Annotated[
        Literal["torch", "compiled"] | None,
        typer.Option(help="Default: compiled where the chip is the CPU.", show_default=False),
    ] = None,
    speculate: Annotated[
        bool, typer.Option("--speculate", help="Draft with the multi-token prediction layer; answers stay the same.")
    ] = False,
    name: Annotated[
        str | None, typer.Option(help="What clients call the model; default: the directory's.", show_default=False)
    ] = None,
    tokenizer: Annotated[
        str | None, typer.Option(help="Default: the model's own; for a preset: digits.", show_default=False)
    ] = None,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="0: a free one.")] = 8000,
    api_key_file: Annotated[
        Path | None, typer.Option(help="Keys that clients may use, one a line.", show_default=False)
    ] = None,
    cache: Annotated[int, typer.Option(help="MiB of cache.")] = 1024,
    sequences: Annotated[int, typer.Option(help="Requests that run at the same time.")] = 256,
    queue: Annotated[int, typer.Option(help="Requests that run or wait; more get status 429.")] = 512,
    new_tokens: Annotated[int, typer.Option(help="Most new tokens of one request.")] = 4096,
    drain: Annotated[float, typer.Option(help="Seconds that running requests have after SIGTERM.")] = 30.0,
    engine: Annotated[
        Literal["own", "vllm"], typer.Option(help="vllm: vLLM in the interpreter that --python names.")
    ] = "own",
    python: Annotated[Path, typer.Option(help="vllm only: an interpreter that has it.")] = Path(
        ".venv-vllm/bin/python"
    ),
    vllm_option: Annotated[
        list[str] | None, typer.Option(help="vllm only: a further argument of `vllm serve`.", show_default=False)
    ] = None,
    proof: Annotated[
        Path | None, typer.Option(help="Start only if this shows that the weights are the trained model's.")
    ] = None,
    seed: SeedOption = 0,
    as_json: JsonOption = False,
) -> None:
    """An OpenAI-compatible server, and a chat page at its root. Ends with grace on SIGTERM."""

    def ready(url: str, about: dict[str, Any]) -> None:
        where = (
            f" on {about['sku']} ({about['truth']}), {about['operators']} operators" if "sku" in about else " in vLLM"
        )
        print(json.dumps(about | {"url": url}) if as_json else f"{about['model']}{where}: {url}", flush=True)

    if engine == "vllm":
        only_own = {"--faults": faults, "--operators": operators, "--tokenizer": tokenizer, "--proof": proof}
        given = [name for name, value in only_own.items() if value is not None] + ["--speculate"] * speculate
        if given:
            raise InputError(
                f"{given[0]} is for the own engine; vLLM has no such thing (--vllm-option passes others on)."
            )
        from beringia.serve.keys import read_keys as read
        from beringia.serve.vllm import VllmSettings, run_vllm

        run_vllm(
            VllmSettings(
                Path(model),
                chip,
                python,
                name=name,
                host=host,
                port=port,
                key=next(iter(read(api_key_file)), None),
                dtype=dtype,
                sequences=sequences,
                drain_seconds=drain,
                more=tuple(vllm_option or ()),
            ),
            ready,
        )
        return
    from beringia.engine import EngineLimits
    from beringia.serve.keys import read_keys
    from beringia.serve.server import STEP_SECONDS, Settings
    from beringia.serve.server import serve as run_server

    settings = Settings(
        model,
        chip=chip,
        faults=faults,
        dtype=dtype,
        operators=operators,
        speculate=speculate,
        name=name,
        tokenizer=tokenizer,
        host=host,
        port=port,
        keys=read_keys(api_key_file),
        engine=EngineLimits(cache_bytes=cache * 2**20, sequences=sequences, step_seconds=STEP_SECONDS),
        open_requests=queue,
        new_tokens=new_tokens,
        drain_seconds=drain,
        proof=proof,
        seed=seed,
    )
    run_server(settings, ready)


@app.command()
def verify(
    file: Annotated[Path, typer.Argument(help="A signed certificate (JSON).", show_default=False)],
    key: Annotated[
        str | None, typer.Option("--key", help="The public key it must be signed by, in hex.", show_default=False)
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Check a signed certificate: whether it is as it was signed, by whom, and what it says."""
    from beringia.records.certificate import Certificate
    from beringia.records.signature import parse_public_key, read_signed
    from beringia.records.signature import verify as check

    signed = read_signed(file, Certificate)
    check(signed, () if key is None else (parse_public_key(key),))
    certificate = signed.record
    says = {
        "signature": "holds",
        "public_key": signed.public_key,
        "key_asked_for": key is not None,
        "chip": certificate.chip,
        "sku": certificate.identity.sku,
        "truth": certificate.identity.truth,
        "identity_hash": certificate.identity_hash,
        "model": certificate.model.name,
        "model_configuration": certificate.model.configuration,
        "model_weights": certificate.model.weights,
        "layers": certificate.layers,
        "compute_dtype": certificate.compute_dtype,
        "fidelity": certificate.identity.switches.get("fidelity"),
        "reference": certificate.reference.sku,
        "bundle": None if certificate.bundle is None else certificate.bundle.model_dump(),
        "tried": list(certificate.tried),
        "scope": certificate.scope,
        "created": certificate.created,
        "verdict": certificate.verdict,
        "reasons": list(certificate.reasons),
    }
    if as_json:
        print(json.dumps(says))
    else:
        _show_certificate(says)


def _bundle_words(bundle: Mapping[str, str] | None) -> str:
    return "" if bundle is None else f", in the bundle {bundle['hash']} signed by {bundle['public_key']}"


def _show_certificate(says: Mapping[str, Any]) -> None:
    whose = "the key asked for" if says["key_asked_for"] else "whose it is was not asked: name a key with --key"
    print(f"signature  holds: nothing was altered since {says['created']}")
    print(f"signed by  {says['public_key']} ({whose})")
    fidelity = f", {says['fidelity']}" if says["fidelity"] else ""
    print(f"chip       {says['chip']}: {says['sku']}, {says['truth']}{fidelity}, identity {says['identity_hash']}")
    print(f"model      {says['scope']}, configuration {says['model_configuration']}, weights {says['model_weights']}")
    print(f"reference  {says['reference']}{_bundle_words(says['bundle'])}")
    print(f"tried      {', '.join(says['tried'])}")
    print(f"verdict    {says['verdict']}")
    for reason in says["reasons"]:
        print(f"           {reason}")


@app.command()
def recipes(
    name: Annotated[str | None, typer.Argument(help="Print this one, to copy and change.", show_default=False)] = None,
    as_json: JsonOption = False,
) -> None:
    """The recipes that ship."""
    from beringia.recipes import DIRECTORY, find_recipe, shipped

    if name is not None:
        text = find_recipe(name).read_text()
        _answer(as_json, {"name": name, "text": text}, text.rstrip())
        return
    about = {name: path.read_text().split("\n", 1)[0].removeprefix("# ") for name, path in shipped().items()}
    width = max(map(len, about))
    listed = "\n".join(f"{name:<{width}}  {sentence}" for name, sentence in about.items())
    _answer(as_json, {"directory": str(DIRECTORY), "recipes": about}, f"{listed}\n{DIRECTORY}")


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
    _open_closed_streams()
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        with leaving_on_signals():
            status = app(arguments, standalone_mode=False, prog_name="beringia")
        sys.exit(status if isinstance(status, int) else 0)
    except typer.Exit as done:
        sys.exit(done.exit_code)
    except BeringiaError as error:
        _explain(str(error), type(error).__name__, "--json" in arguments)
        sys.exit(error.exit_code)
    except typer.Abort:
        sys.exit(130)
    except BrokenPipeError:  # whoever read standard output has enough
        _read_no_more()
        sys.exit(128 + signal.SIGPIPE)
    except Exception as error:
        if not hasattr(error, "format_message"):  # not one of click's usage errors: a bug, with its traceback
            raise
        if error.format_message():  # empty where no verb was given: typer has shown the help then
            _explain(error.format_message(), type(error).__name__, "--json" in arguments)
        sys.exit(2)


def _read(asked: str, change: list[str] | None, out: Path | None) -> tuple[Recipe, str, RunDirectory]:
    """The recipe with its changes, its text as it stands in the file, and the run's directory."""
    from beringia.recipes import find_recipe
    from beringia.records.recipe import read_recipe
    from beringia.records.run_directory import RunDirectory
    from beringia.supervise.run_files import examine_run

    path = find_recipe(asked)
    parsed = read_recipe(path, dict(_change(one) for one in change or []))
    run = RunDirectory(out or Path("runs") / parsed.name)
    examine_run(parsed, run)  # before anything there is touched
    return parsed, path.read_text(), run


def _change(text: str) -> tuple[str, Any]:
    import tomllib

    key, separator, value = text.partition("=")
    if not separator:
        raise RecipeError(f"--set {text}: write key=value, for instance --set train.steps=100, or key= to unset it.")
    if not value.strip():
        return key.strip(), None
    try:
        return key.strip(), tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError:
        return key.strip(), value.strip()  # a bare word is a string


def _stages() -> Callable[[str], None]:
    """Says each stage as it begins, with the time since the command did, on a terminal and in a log alike."""
    from beringia.report.words import clock

    began = time.monotonic()

    def say(text: str) -> None:
        with suppress(BrokenPipeError):
            print(f"[{clock(time.monotonic() - began)}] {text}", file=sys.stderr, flush=True)

    return say


def _answer(as_json: bool, document: dict[str, Any], sentence: str) -> None:
    print(json.dumps(document) if as_json else sentence)


def _explain(sentence: str, kind: str, as_json: bool) -> None:
    """For a program on standard output where it asked for that, for a person on standard error in any case."""
    if as_json:
        print(json.dumps({"error": kind, "message": sentence}))
    with suppress(BrokenPipeError):
        print(f"beringia: {sentence}", file=sys.stderr, flush=True)


def _print_summary(summary: Summary, as_json: bool) -> None:
    """It may find no reader (`| head`); the exit code says how the run ended all the same."""
    from beringia.report.summary import print_table

    try:
        if as_json:
            print(summary.model_dump_json())
        else:
            print_table(summary, _console())
        sys.stdout.flush()
    except BrokenPipeError:
        _read_no_more()


def _read_no_more() -> None:
    """Nobody reads standard output: the interpreter must not try again at its end."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _open_closed_streams() -> None:
    """A shell's `>&-` leaves none; what is printed goes nowhere then."""
    sys.stdout = sys.stdout or open(os.devnull, "w")  # noqa: SIM115 - for the life of the process
    sys.stderr = sys.stderr or open(os.devnull, "w")  # noqa: SIM115


def _exit_if_stopped(status: str, signal: int | None) -> None:
    if status == "stopped":
        raise typer.Exit(1 if signal is None else 128 + signal)


def _console() -> Any:
    from beringia.progress import PatientConsole

    # Where nobody watches there is no width to ask for: the tables are made for this many columns.
    return PatientConsole() if sys.stdout.isatty() else PatientConsole(width=_LOG_COLUMNS)


def _progress(recipe: Recipe) -> Any:
    from beringia.progress import showing_progress

    return showing_progress(recipe)


if __name__ == "__main__":
    main()
