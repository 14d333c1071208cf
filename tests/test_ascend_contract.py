"""The Ascend adapter against torch_npu as its wheels have it. Contract-tested, never run on Ascend.

`tests/data/` records the names and signatures of one wheel for each torch that Beringia admits. Here every use of
torch_npu in the adapter is found in its syntax tree and held against each record, and the adapter trains a small module
on the emulated 910B registered as `npu`, through a stand-in that has the recorded names and no others.
"""

from __future__ import annotations

import ast
import inspect
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from record_torch_npu_signatures import record
from torch_npu_stand_in import RECORDS, read_record, signature, stand_in
from waiting import GIVE_UP_SECONDS

from beringia.chips import ascend
from beringia.errors import ChipUnavailable

SOURCE = Path(inspect.getsourcefile(ascend) or "")
VERSIONS = [json.loads(path.read_text())["version"] for path in RECORDS]


def uses(source: str) -> list[tuple[tuple[str, ...], ast.AST, ast.AST]]:
    """Every longest `torch_npu.a.b` or `self._torch_npu.a.b`: its names, its node and the node around it."""
    tree = ast.parse(source)
    around = {child: parent for parent in ast.walk(tree) for child in ast.iter_child_nodes(parent)}
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and not isinstance(around[node], ast.Attribute):
            names = chain(node)
            if names is not None:
                found.append((names, node, around[node]))
    return found


def chain(node: ast.expr) -> tuple[str, ...] | None:
    names: list[str] = []
    while isinstance(node, ast.Attribute) and node.attr != "_torch_npu":
        names.insert(0, node.attr)
        node = node.value
    root = node.id if isinstance(node, ast.Name) else node.attr if isinstance(node, ast.Attribute) else None
    return tuple(names) if root in ("torch_npu", "_torch_npu") and names else None


def check(names: tuple[str, ...], node: ast.AST, parent: ast.AST, modules: dict[str, Any]) -> None:
    """Raise unless the recorded wheel has what is named, and accepts the call or assignment around it."""
    entry: dict[str, Any] = {"module": "torch_npu"}
    for name in names:
        if "settable" in entry:
            side = "settable" if isinstance(getattr(node, "ctx", None), ast.Store) else "readable"
            assert name in entry[side], f"{'.'.join(names)} is not {side}"
            return
        assert "module" in entry, f"{'.'.join(names)}: nothing is known of {name}"
        entry = modules[entry["module"]][name]
    if isinstance(parent, ast.Call) and parent.func is node:
        arguments = entry.get("function", entry.get("class"))
        assert arguments is not None, f"{'.'.join(names)} cannot be called"
        signature(arguments).bind(*parent.args, **{keyword.arg or "": None for keyword in parent.keywords})


@pytest.mark.parametrize("version", VERSIONS)
def test_every_use_of_torch_npu_exists_in_the_wheel_and_its_signature_accepts_the_call(version: str) -> None:
    modules = read_record(version)["modules"]
    found = uses(SOURCE.read_text())
    assert len(found) >= 25
    for names, node, parent in found:
        check(names, node, parent, modules)


@pytest.mark.parametrize(
    "wrong",
    [
        "torch_npu.npu.get_device_nickname(0)",
        "torch_npu.npu.get_device_name(0, 1)",
        "torch_npu.npu.set_compile_mode(jit=False)",
        "torch_npu.npu.matmul.allow_tf32 = False",
        "print(torch_npu.npu.config.allow_internal_format)",
        "self._torch_npu.npu.set_deterministic_level()",
        "torch_npu._C._npu_getDeviceName()",
    ],
)
def test_a_use_that_the_wheel_does_not_have_is_found(wrong: str) -> None:
    modules = read_record("2.13.0")["modules"]
    with pytest.raises((KeyError, AssertionError, TypeError)):
        for names, node, parent in uses(wrong):
            check(names, node, parent, modules)


def test_the_adapter_reaches_torch_npu_in_no_other_way() -> None:
    tree = ast.parse(SOURCE.read_text())
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)]
    named = {alias.name for node in imports for alias in node.names} | {getattr(node, "module", "") for node in imports}
    assert not any((name or "").startswith("torch_npu") for name in named)
    calls = [ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.Call)]
    assert [call for call in calls if call.startswith("importlib.import_module")] == [
        "importlib.import_module('torch_npu')"
    ]
    assert not any(call.startswith(("getattr", "hasattr", "vars")) for call in calls)
    assert "torch.npu" not in SOURCE.read_text()


def test_one_wheel_is_on_record_for_each_torch_and_it_is_the_oldest_accepted() -> None:
    assert sorted(VERSIONS) == sorted(ascend.OLDEST.values())


@pytest.mark.parametrize("version", VERSIONS)
def test_the_wheel_registers_the_collective_backend_and_reads_the_variables(version: str) -> None:
    recorded = read_record(version)
    assert "hccl" in recorded["collective_backends"]
    assert {"TORCH_NPU_FALLBACK_CPU_DISABLE", "INF_NAN_MODE_ENABLE", "TORCH_HCCL_ASYNC_ERROR_HANDLING"} <= set(
        recorded["environment_variables"]
    )


def test_the_stand_in_refuses_what_the_wheel_does_not_have() -> None:
    module = stand_in("2.13.0")
    with pytest.raises(AttributeError):
        module.npu.get_device_nickname(0)
    with pytest.raises(TypeError):
        module.npu.mem_get_info(0, 1, 2)
    with pytest.raises(AttributeError):
        module.npu.matmul.allow_tf32 = True


TRAINING = """
import json, sys
import torch
from torch import nn
import torch_npu_stand_in
from beringia.chips.ascend import OLDEST, Ascend
from beringia.chips.emulated import register_device
module, answers = torch_npu_stand_in.install(OLDEST[".".join(torch.__version__.split(".")[:2])])
register_device("npu", "ascend-910b")

chip = Ascend(0)
generator = torch.Generator().manual_seed(7)
inputs, targets = torch.randn(8, 6, generator=generator), torch.randn(8, 1, generator=generator)
model = nn.Sequential(nn.Linear(6, 16), nn.SiLU(), nn.Linear(16, 1))
with torch.no_grad():
    for parameter in model.parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)

def train(model, device):
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05, fused=False)
    losses = []
    for step in range(5):
        optimizer.zero_grad()
        loss = (model(inputs.to(device)) - targets.to(device)).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses

state = {name: value.clone() for name, value in model.state_dict().items()}
on_chip = model.to(chip.device)
device = str(next(on_chip.parameters()).device)
chip.begin_step(1)
with chip.stream():
    losses = train(on_chip, chip.device)
chip.synchronize()
reference = nn.Sequential(nn.Linear(6, 16), nn.SiLU(), nn.Linear(16, 1))
reference.load_state_dict(state)
print(json.dumps({
    "device": device,
    "losses": losses,
    "reference": train(reference, "cpu"),
    "identity": chip.identity.model_dump(),
    "memory": chip.memory().total_bytes,
    "backend": chip.collective_backend,
    "calls": answers.calls,
    "level": answers.level,
}))
"""


@pytest.fixture(scope="module")
def trained() -> dict[str, Any]:
    """What a process says that trained on `npu:0` through the adapter, the stand-in and the emulated device."""
    here = Path(__file__).parent
    environment = {
        name: value for name, value in os.environ.items() if name not in (*ascend.ENVIRONMENT, "HCCL_OP_EXPANSION_MODE")
    } | {"PYTHONPATH": os.pathsep.join([str(here), str(here.parent)])}
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", TRAINING],
        env=environment,
        capture_output=True,
        text=True,
        timeout=GIVE_UP_SECONDS,
    )
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout.splitlines()[-1]))


def test_a_module_trains_on_npu_through_the_adapter_as_it_does_on_the_cpu(trained: dict[str, Any]) -> None:
    assert trained["device"] == "npu:0"
    assert trained["losses"][-1] < trained["losses"][0] / 2
    # The emulated 910B multiplies float32 in float32 in another order, over sums of at most 16 terms and five AdamW
    # steps: last-digit differences, so a thousand float32 roundoffs (11 fraction bits would show 2^-12).
    assert trained["losses"] == pytest.approx(trained["reference"], rel=1000 * 2.0**-24)


def test_opening_switches_off_what_changes_numbers_and_records_it(trained: dict[str, Any]) -> None:
    switches = trained["identity"]["switches"]
    # The stand-in starts with HF32 and just-in-time compilation on, so these were switched.
    assert switches["hf32_matmul"] == switches["hf32_conv"] == switches["jit_compile"] == "False"
    assert switches["deterministic_algorithms"] == "True" and switches["deterministic_level"] == "1"
    assert trained["level"] == 1
    # The stand-in was imported before the adapter set the variables, and the identity says so.
    assert switches["set_after_torch_npu_was_imported"] == ", ".join(ascend.ENVIRONMENT)
    assert switches["overflow"] == "inf_nan" and switches["TORCH_NPU_FALLBACK_CPU_DISABLE"] == "1"


def test_the_identity_says_that_it_never_ran_on_ascend(trained: dict[str, Any]) -> None:
    identity = trained["identity"]
    assert identity["note"] == "contract-tested, never run on Ascend"
    assert identity["sku"] == "Ascend910B2 (soc 222)" and identity["runtime"] == "CANN 8.5.0"
    assert identity["driver"].startswith("driver 25.3.0, firmware ")


def test_memory_and_streams_go_through_torch_npu(trained: dict[str, Any]) -> None:
    assert trained["memory"] == 64 * 2**30 and trained["backend"] == "hccl"
    assert {"stream", "Stream", "synchronize"} <= set(trained["calls"])


def test_an_environment_that_asks_for_saturation_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        for name in ascend.ENVIRONMENT:
            patch.setenv(name, ascend.ENVIRONMENT[name][0])
        patch.setenv("HCCL_DETERMINISTIC", "strict")
        assert ascend.prepare_environment() == []
        patch.delenv("HCCL_DETERMINISTIC")
        assert ascend.prepare_environment() == ["HCCL_DETERMINISTIC"]
        patch.setenv("INF_NAN_MODE_ENABLE", "0")
        with pytest.raises(ChipUnavailable, match="INF_NAN_MODE_ENABLE=0 is set, but Beringia needs 1"):
            ascend.prepare_environment()


def test_a_torch_npu_that_cannot_refuse_the_cpu_or_fits_another_torch_is_refused() -> None:
    ascend._check_versions("2.13.0+cpu", "2.13.0")
    ascend._check_versions("2.12.1", "2.12.0.post3+gitabcdef")
    with pytest.raises(ChipUnavailable, match="cannot be told not to: install 2.12.0.post3 or newer"):
        ascend._check_versions("2.12.0", "2.12.0.post2")
    with pytest.raises(ChipUnavailable, match="made for torch 2.12 and torch is 2.13.0"):
        ascend._check_versions("2.13.0", "2.12.0.post3")


@pytest.mark.slow
def test_the_record_is_what_the_wheel_says(tmp_path: Path) -> None:
    """Downloads the wheel (about 43 MB), when a package index can be reached."""
    version = ascend.OLDEST[".".join(torch.__version__.split(".")[:2])]
    arguments = ["--no-deps", "--quiet", "--only-binary=:all:", "--dest", str(tmp_path)]
    target = ["--platform", "manylinux_2_28_x86_64", "--python-version", "311"]
    command = [sys.executable, "-m", "pip", "download", *arguments, *target, f"torch-npu=={version}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=GIVE_UP_SECONDS)
    if done.returncode != 0:
        pytest.skip(f"the wheel cannot be downloaded here: {done.stderr.strip().splitlines()[-1:]}")
    (wheel,) = tmp_path.glob("*.whl")
    assert record(wheel) == read_record(version)
