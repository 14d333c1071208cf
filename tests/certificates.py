"""Certificates for tests: one that has something in every field, and one for a chip that a run has opened."""

from __future__ import annotations

from typing import Any

from beringia.records.certificate import Certificate, Located, Measure, ModelFingerprint, OperatorCheck, ProbeResult
from beringia.records.identity import ChipIdentity
from beringia.records.model_source import configuration_hash

IDENTITY = ChipIdentity(
    vendor="emulated",
    sku="H800",
    truth="emulated",
    driver="none",
    runtime="beringia",
    torch="2.13.0",
    plugin="none",
    switches={"fidelity": "fast", "threads": "1"},
    note="Emulated; assumed: nothing.",
)
_MEASURE = Measure(name="rms", value=0.5, bound=1.5, unit="ulps", reason="unit roundoff times the root of the length")
_UNMEASURED = Measure(name="worst", value=None, bound=4.0, reason="four times the noise floor")
_CHECK = OperatorCheck(
    module="model.layers.0.mlp",
    operator="aten.mm.default",
    direction="backward",
    ordinal=2,
    position=17,
    shapes=((4, 64), (64, 32)),
    dtype="bfloat16",
    attributes="dim=1",
    basis="reduction length 64",
    error=1.25e-3,
    reference_error=1.1e-3,
    measures=(_MEASURE, _UNMEASURED),
    worst_element=(3, 7),
    found=0.75,
    expected=0.5,
    refused="",
)


def certificate(identity: ChipIdentity = IDENTITY, **changes: Any) -> Certificate:
    """A certificate for the preset r2-nano whose verdict is `train`, with these fields changed."""
    fields: dict[str, Any] = {
        "created": "2026-11-26T10:00:00Z",
        "beringia": "0.1.0",
        "chip": "emulated:h800",
        "identity": identity,
        "identity_hash": identity.hash,
        "reference": IDENTITY,
        "model": ModelFingerprint(
            name="r2-nano", configuration=configuration_hash("r2-nano", None), weights="ab" * 32, parameters=123456
        ),
        "compute_dtype": "bfloat16",
        "seed": 7,
        "verdict": "train",
        "reasons": ("every operator lies within its bound", "größer als nötig"),
        "mitigations": ("none needed",),
        "power": 0.95,
        "first_wrong": Located(check=_CHECK, consistent_with=("hf32",), mitigations=("switch it off",)),
        "probes": (
            ProbeResult(
                probe="operators",
                subject="layers.0",
                outcome="passed",
                rules_out="train",
                summary="all within their bounds",
                measures=(_MEASURE,),
                seconds=2.5,
            ),
        ),
        "operators": (_CHECK,),
        "seconds": 12.5,
    }
    return Certificate(**(fields | changes))


ASCEND = ChipIdentity(
    vendor="emulated",
    sku="Ascend 910B",
    truth="emulated",
    driver="none",
    runtime="beringia",
    torch="2.13.0",
    plugin="none",
    switches={"fidelity": "fast", "profile": "5f" * 32, "accumulator": "float32, nearest-even", "threads": "1"},
    note="Emulated; assumed: the order of terms inside a block.",
)
PROCESSOR = ChipIdentity(
    vendor="cpu",
    sku="Intel Xeon Platinum 8481C",
    truth="real",
    driver="none",
    runtime="AVX512",
    torch="2.13.0",
    plugin="none",
    switches={"threads": "1"},
)
ATTENTION = "aten._scaled_dot_product_fused_attention_overrideable_backward.default"
_NORM = (
    "_to_copy pow.Tensor_Scalar mean.dim add.Tensor rsqrt mul.Tensor",
    "mul.Tensor sum.dim_IntList pow.Tensor_Scalar mul.Scalar div.Scalar add.Tensor _to_copy",
)
_LINEAR = ("_to_copy mm _unsafe_view cat", "mm cat _to_copy")
_OPERATORS = {
    "layernorm": _NORM,
    "norm": _NORM,
    "proj": _LINEAR,
    "lm_head": _LINEAR,
    "embed_tokens": ("embedding", "embedding_dense_backward"),
    "self_attn": (
        "_to_copy mm _unsafe_view mul.Tensor sub.Tensor add.Tensor cat clone"
        " _scaled_dot_product_fused_attention_overrideable",
        "_scaled_dot_product_fused_attention_overrideable_backward slice_backward neg mul.Tensor add.Tensor cat"
        " sum.dim_IntList mm _to_copy",
    ),
    "mlp": (
        "_to_copy mm sigmoid add.Tensor topk gather sum.dim_IntList div.Tensor masked_fill.Scalar scatter_.value",
        "index_select scatter_add div.Tensor sum.dim_IntList sigmoid_backward mm mul.Tensor _to_copy",
    ),
    "experts": (
        "floor_divide remainder.Scalar cumsum index.Tensor index_select mm silu mul.Tensor scatter.src sum.dim_IntList",
        "gather mm sigmoid sub_.Tensor add.Scalar mul.Tensor fill_.Scalar stack cat _to_copy index_select",
    ),
    "shared_experts": ("_to_copy mm _unsafe_view silu mul.Tensor", "mm sigmoid sub_.Tensor add.Scalar mul.Tensor cat"),
}
"""Forward and backward operators of a module, by the end of its name, as r2-nano calls them."""
_IN_A_LAYER = (
    "input_layernorm self_attn self_attn.q_a_layernorm self_attn.kv_a_layernorm self_attn.kv_b_proj self_attn.o_proj"
    " post_attention_layernorm mlp mlp.experts mlp.shared_experts mlp.shared_experts.down_proj"
)
_MOVES = ("cat", "clone", "_unsafe_view", "index", "gather", "slice", "fill_", "stack", "embedding", "topk", "scatter")


def realistic(verdict: str = "infer", *, layers: int = 4, repeats: int = 5, **changes: Any) -> Certificate:
    """What qualifying an emulated Ascend 910B for r2-nano gives, made by a formula, with shares as they were found.

    Attention's gradient in the last layer but one is wrong where the verdict is `infer` or `unfit`.
    """
    checks = _checks(layers, repeats)
    wrong = [] if verdict in ("train", "inconclusive") else [f"model.layers.{layers - 2}.self_attn"]
    checks = [_wrong(check) if check.module in wrong and check.operator == ATTENTION else check for check in checks]
    first = next((check for check in checks if check.used > 1), None)
    located = first and Located(
        check=first,
        consistent_with=("a mask or a length that is not respected: wrong past a position, right before it",),
        mitigations=("use attention made of single operators, or sequences shorter than the position",),
    )
    probes = _probes(layers, bool(wrong), verdict)
    fields: dict[str, Any] = {
        "chip": "emulated:ascend-910b",
        "reference": PROCESSOR,
        "verdict": verdict,
        "reasons": _reasons(first, probes, verdict),
        "mitigations": located.mitigations if located else (),
        "power": 0.62 if verdict == "inconclusive" else 0.97,
        "first_wrong": located,
        "probes": probes,
        "operators": tuple(checks),
        "seconds": 61.3,
    }
    return certificate(ASCEND, **(fields | changes))


def _checks(layers: int, repeats: int) -> list[OperatorCheck]:
    modules = ["model.embed_tokens"]
    modules += [f"model.layers.{number}.{name}" for number in range(layers) for name in _IN_A_LAYER.split()]
    modules += ["model.norm", "lm_head"]
    passes = [("forward", module, 0) for module in modules] + [("backward", module, 1) for module in modules[::-1]]
    calls = [
        (direction, module, f"aten.{operator}" if "." in operator else f"aten.{operator}.default", ordinal)
        for direction, module, half in passes
        for operator in _operators_of(module)[half].split()
        for ordinal in range(repeats)
    ]
    calls += [("forward", "", f"aten.{name}.default", 0) for name in ("linalg_vector_norm", "_log_softmax")]
    calls += [("optimizer", "", "aten._fused_adamw_.default", 0), ("decode", "lm_head", "aten.mm.default", 0)]
    return [_checked(position, *call) for position, call in enumerate(calls)]


def _operators_of(module: str) -> tuple[str, str]:
    last = module.rpartition(".")[2]
    return next(operators for name, operators in _OPERATORS.items() if last == name or last.endswith("_" + name))


def _checked(position: int, direction: Any, module: str, operator: str, ordinal: int) -> OperatorCheck:
    exact = any(name in operator for name in _MOVES)
    share = 0.0 if exact else 0.8 + 0.0003 * (position % 7) if position % 3 else 0.02 * (position % 20)
    bound = 0.0021 + 1e-5 * (position % 11)
    reason = "moves numbers: every bit" if exact else "1.25 times storing and adding up"
    return OperatorCheck(
        module=module,
        operator=operator,
        direction=direction,
        ordinal=ordinal,
        position=position,
        shapes=((128, 64 + 16 * (position % 4)), (64 + 16 * (position % 4), 256)),
        dtype="bfloat16",
        attributes="dim=-1, keepdim=True" if position % 5 == 0 else "",
        basis=reason,
        error=share * bound,
        reference_error=share * bound * 0.99,
        measures=(
            Measure(name="not finite on one side", value=0, bound=0.5, unit="elements", reason="as in float64 rounded"),
            Measure(name="worst element", value=share * 0.0012, bound=0.0024, reason=reason),
            Measure(name="root mean square error", value=share * bound, bound=bound, reason=reason),
        ),
        worst_element=(position % 128, position % 256),
        found=0.123456 + position / 1e5,
        expected=0.123457 + position / 1e5,
    )


def _wrong(check: OperatorCheck) -> OperatorCheck:
    """As the fault `wrong-backward` with a strength of 5 % leaves it."""
    rms = Measure(
        name="root mean square error", value=0.012934, bound=0.0026718, reason="1.25 times storing and adding up"
    )
    far = Measure(name="worst element", value=5.865e-5, bound=1.1754943508222875e-38, reason="two products, a softmax")
    changes = {
        "shapes": ((4, 4, 32, 32), (4, 4, 32, 64), (4, 4, 32, 64), (4, 4, 32, 32), (4, 4, 32), (0,)),
        "attributes": "attn_bias=None, grad_input_mask=[True, True, True, False], is_causal=True, scale=0.125",
        "error": 0.036979,
        "reference_error": 0.0021,
        "measures": (check.measures[0], far, rms),
        "worst_element": (1, 2, 31, 31),
        "found": -5.8650970458984375e-05,
        "expected": 0.0,
        "wrong_share": 0.0637,
        "wrong_from": (0, 0, 17, 0),
        "wrong_to": (3, 3, 31, 63),
        "factor": 1.00163,
    }
    return check.model_copy(update=changes)


def _reasons(first: OperatorCheck | None, probes: tuple[ProbeResult, ...], verdict: str) -> tuple[str, ...]:
    if verdict == "train":
        return ("152 bounds hold; the most that one is used is 81%",)
    if verdict == "inconclusive":
        thin = "with so few batches a sound chip is shown equal with a chance of 62% only, and 80% are needed"
        return (f"the evidence is thin: {thin}; give it more batches (--batches)",)
    named = [] if first is None else [f"the first wrong operator is {first.name}"]
    return (*named, *(probe.summary for probe in probes if probe.outcome == "failed"))


def _probes(layers: int, wrong: bool, verdict: str) -> tuple[ProbeResult, ...]:
    def probe(kind: str, subject: str, summary: str, share: float | None = None, **more: Any) -> ProbeResult:
        bound, unit, name = more.pop("bound", 1.5), more.pop("unit", ""), more.pop("name", "worst")
        measures = (
            () if share is None else (Measure(name=name, value=share * bound, bound=bound, unit=unit, reason="r"),)
        )
        outcome = "told" if share is None else "failed" if share > 1 else "passed"
        uses = {"outcome": outcome, "rules_out": "neither" if share is None else "train"} | more
        return ProbeResult(probe=kind, subject=subject, summary=summary, measures=measures, seconds=1.25, **uses)

    def effect(subject: str, share: float, **more: Any) -> ProbeResult:
        words = "farther from float64 than rounding explains" if share > 1 else "as far from float64 as a sound chip"
        fields = {"unit": "noise floors", "name": "effect"} | more
        return probe("lockstep", subject, f"{subject}: {words}", share, **fields)

    parts = ("self_attn.o_proj.weight", "self_attn.kv_b_proj.weight", "mlp.experts.down_proj", "input_layernorm.weight")
    names = [f"model.layers.{number}.{part}" for number in range(layers) for part in parts]
    names = ["model.embed_tokens.weight", *names, "model.norm.weight", "lm_head.weight"]
    hit = f"model.layers.{layers - 2}.self_attn"
    gradients = [effect(f"gradient {n}", 2.4 if wrong and hit in n else 0.2 + 0.03 * (len(n) % 9)) for n in names]
    places = ["model.embed_tokens", *(f"model.layers.{number}" for number in range(layers)), "model.norm", "lm_head"]
    updates = [effect(f"update {n}", 1.2 if wrong and f"{n}." in hit else 0.15 + 0.05 * (len(n) % 5)) for n in places]
    outputs = effect("outputs", 4.1 if verdict == "unfit" else 0.41, rules_out="infer")
    return (
        probe("arithmetic", "bfloat16", "Products in chunks of 128 terms, accumulator of 24 bits, nearest-even."),
        probe(
            "arithmetic", "integers: sums", "1,000 sums are exact.", 0.0, rules_out="infer", unit="numbers", bound=0.5
        ),
        *(probe("lengths", f"{n} tokens", f"attention with {n} tokens", 0.3 + n / 4096) for n in (128, 512, 2048)),
        probe("repeat", "training step", "Three repetitions gave the same bits.", 0.0, bound=0.5),
        outputs,
        effect("decode", 0.33, rules_out="infer"),
        *gradients,
        *updates,
        effect("losses of training", 0.45, bound=3.0),
        probe("lockstep", "loss", "the loss is equivalent", 0.3, unit="nats", bound=0.0023),
        probe("collectives", "all-reduce, 2 ranks", "One chip is here; two ranks are needed.", outcome="inconclusive"),
        probe("memory", "patterns", "Every byte of 64 MB with 6 patterns came back as written.", 0.0, bound=0.5),
        probe("memory", "capacity", "64 GB by the driver; 61.2 GB could be had."),
        probe("soak", "repetitions", "None of 400 repetitions differs.", 0.75, bound=0.01, unit="share"),
        probe(
            "speed", "products, bfloat16", "A product of 4096×4096 takes 0.44 ms: 312 TFLOP/s, 83 % of the data sheet."
        ),
        probe("speed", "memory", "Copies run at 1.31 TB/s."),
    )
