"""Parity of each kernel with its reference: outputs and gradients, compared in float64.

References run on the same device with the same operands, cast to float64. The recurrence of the
scan and the experts' loop over tokens are too slow for long sequences, so sizes are awkward rather
than large: packed boundaries, odd lengths, one token, an expert without tokens, rows that do not
fill a tile. At full length a kernel is compared with the chunked float64 form, which the tests
compare with the reference. Uninitialised memory is filled with NaN, and each kernel runs twice:
results that differ in a single bit show a race.
"""

import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import count

import torch
from benchmarks.gpu import cases, steps
from benchmarks.gpu.cases import Case, Problem
from benchmarks.gpu.record import Figure, Results
from benchmarks.gpu.section import Part, Rows, Section
from benchmarks.gpu.setting import Draw, Setting
from benchmarks.models import configs, targets, tokens_of, training_loss
from tests.ops.contract import outputs_and_gradients
from torch import Tensor

from nemotron3.models.config import ModelConfig
from nemotron3.models.nemotron_h import LanguageModel
from nemotron3.ops.backends import Backend

FLOAT32, BFLOAT16 = 1e-4, 2e-2
"""Largest difference of a result or gradient, by norm and by its largest entry. The float32 bound
allows for the approximate exponentials of a GPU and for sums over thousands of tokens; in bfloat16
operands are rounded to 8 bits two or three times before a gradient."""
_DTYPES = {torch.float32: FLOAT32, torch.bfloat16: BFLOAT16}


def parts(setting: Setting) -> dict[str, Part]:
    (name, config), *_ = setting.models().items()
    short = operations(config, setting)
    long = {
        f"{case.operation}, {name} at full length": [case]
        for case in cases.layer_cases(config, setting.tokens, torch.bfloat16)
    }
    return {
        **{name: lambda some=some: check(some, setting) for name, some in short.items()},
        "whole model": lambda: whole_model(setting),
        **{name: lambda some=some: check(some, setting, "torch") for name, some in long.items()},
    }


def operations(config: ModelConfig, setting: Setting) -> dict[str, list[Case]]:
    """Awkward cases of each operation, in both dtypes."""
    attention, mamba, moe = config.attention, config.mamba, config.moe
    assert attention is not None
    assert mamba is not None
    assert moe is not None
    contexts = (
        [((0, 37), 1), ((5, 70), 3)] if setting.is_toy else [((0, 37, 9000), 1), ((5, 700), 5)]
    )
    streams = [(1,), (5, 1, 18)] if setting.is_toy else [(1,), (257,), (5, 1, 130, 64, 33)]
    packed = streams[-1]
    few, odd = cases.few_heads(mamba), cases.odd_mamba(mamba)
    inner, width = mamba.inner_size, moe.moe_latent_size or config.hidden_size
    hidden = moe.moe_intermediate_size
    k, vocab = moe.num_experts_per_tok, config.vocab_size
    found: dict[str, list[Case]] = {}
    for dtype in _DTYPES:
        some = [
            *(cases.scan(few, lengths, dtype) for lengths in streams),
            cases.scan(odd, packed, dtype),
            *(steps.scan_steps(few, rows, 1, dtype) for rows in (1, 3)),
            steps.scan_steps(few, 2, 5, dtype, kept=True),
            steps.scan_steps(odd, 2, 3, dtype),
            *(steps.convolution_steps(67, 2, n, dtype, kept=n > 2) for n in (1, 2, 5)),
            *(steps.attention_steps_after(attention, c, n, dtype) for c, n in contexts),
            *(cases.convolution(mamba.conv_channels, lengths, dtype) for lengths in streams),
            cases.convolution(67, packed, dtype, taps=2),
            *(cases.gated_norm(tokens, inner, mamba.n_groups, dtype) for tokens in (1, 37)),
            cases.gated_norm(9, 132, 2, dtype),
            *(cases.norm(tokens, config.hidden_size, dtype) for tokens in (1, 37)),
            cases.norm(9, 33, dtype),
            cases.experts(1, 2 * k, k, width=width, hidden=hidden, dtype=dtype),
            cases.experts(9, 4 * k, k, width=width, hidden=hidden, dtype=dtype),
            cases.experts(37, 3 * k, k, used=2 * k, width=width, hidden=hidden, dtype=dtype),
            cases.experts(23, 5, 2, width=35, hidden=20, dtype=dtype),
            cases.experts(23, 5, 2, width=35, hidden=20, activation="swiglu", dtype=dtype),
            *(cases.cross_entropy(n, config.hidden_size, vocab, dtype) for n in (1, 33)),
            cases.cross_entropy(7, 33, 67, dtype),
        ]
        for case in some:
            found.setdefault(case.operation, []).append(case)
    return found


def check(some: Iterable[Case], setting: Setting, against: Backend = "reference") -> Figure:
    """The largest differences of each case, and which are too large."""
    checks, red = [], []
    for seed, case in zip(count(1), some, strict=False):
        problem = case.draw(Draw(setting.device, seed))
        dtype = problem.operands[0].dtype
        allowed = tolerance(dtype, setting)
        first, second = (_results(case, problem.operands, problem.call("triton")) for _ in range(2))
        expected = _exact_results(case, problem, against)
        differences = [difference(a, e) for a, e in zip(first, expected, strict=True)]
        repeats = all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
        worst = max(differences)
        words = f"{case.size}, {str(dtype).removeprefix('torch.')}"
        checks.append({"case": words, "differences": differences, "repeats": repeats})
        if not worst <= allowed:
            red.append(f"{words}: differs by {worst:.1e}, allowed {allowed:.0e}")
        if not repeats:
            red.append(f"{words}: two runs differ, which is a race")
    return {"checks": checks, "red": red, "worst": max(max(c["differences"]) for c in checks)}


def whole_model(setting: Setting) -> Figure:
    """Loss and gradients of a small model on the device, against float64 on the CPU."""
    config = configs()["toy"] if setting.is_toy else ModelConfig.preset("tiny")
    tokens = tokens_of(config, 2, 24 if setting.is_toy else 256)
    exact = _loss_and_gradients(LanguageModel.from_config(config).double(), tokens)
    model = LanguageModel.from_config(config).to(setting.device)
    single = _loss_and_gradients(model, tokens.to(setting.device))
    model.activation_dtype = torch.bfloat16
    half = _loss_and_gradients(model, tokens.to(setting.device))
    red = []
    differences = [difference(a.cpu(), e) for a, e in zip(single, exact, strict=True)]
    differences.append(difference(half[0].cpu(), exact[0]))
    # The errors of operations accumulate over the layers.
    if not max(differences[:-1]) <= 10 * FLOAT32:
        red.append(f"float32 differs by {max(differences[:-1]):.1e}, allowed {10 * FLOAT32:.0e}")
    if not differences[-1] <= BFLOAT16:
        red.append(f"the bfloat16 loss differs by {differences[-1]:.1e}, allowed {BFLOAT16:.0e}")
    words = f"{len(tokens)} x {tokens.shape[1]} tokens"
    checks = [{"case": words, "differences": differences, "repeats": True}]
    return {"checks": checks, "red": red, "worst": max(differences)}


def _loss_and_gradients(model: LanguageModel, tokens: Tensor) -> list[Tensor]:
    model.zero_grad(set_to_none=True)
    total = training_loss(model, targets(tokens))
    total.backward()
    return [total.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]


def difference(actual: Tensor, expected: Tensor) -> float:
    """The larger of the relative differences by norm and by largest entry.

    The norm alone would not show one wrong entry of a million. Another shape, or a value that is
    not finite, gives infinity.
    """
    if actual.shape != expected.shape or not bool(torch.isfinite(actual).all()):
        return float("inf")
    if not expected.numel():
        return 0.0
    error, scale = (actual.double() - expected.double()), expected.double()
    by_norm = error.norm() / scale.norm().clamp_min(1e-30)
    by_entry = error.abs().max() / scale.abs().max().clamp_min(1e-30)
    return float(torch.maximum(by_norm, by_entry))


def tolerance(dtype: torch.dtype, setting: Setting) -> float:
    """Largest difference of a kernel; Triton's interpreter truncates bfloat16, GPUs round it."""
    allowed = _DTYPES[dtype]
    return 2 * allowed if setting.is_toy and dtype == torch.bfloat16 else allowed


def _exact_results(case: Case, problem: Problem, backend: Backend) -> list[Tensor]:
    """Results in float64; the cast operands are large, and freed when this returns."""
    exact = [t.double() if t.is_floating_point() else t for t in problem.operands]
    return _results(case, exact, problem.call(backend))


def _results(case: Case, operands: list[Tensor], call: cases.Call) -> list[Tensor]:
    with poisoned():
        if case.has_gradient:
            return outputs_and_gradients(call, operands)
        with torch.no_grad():
            return list(call(*(t.clone() for t in operands)))  # states are written in place


@contextmanager
def poisoned() -> Iterator[None]:
    """Fill uninitialised memory with NaN, so that reads of it are detected."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # warnings about nondeterministic operations
        yield
    torch.use_deterministic_algorithms(False)


def table(results: Results) -> Rows:
    rows = [["", "cases", "largest difference", ""]]
    for name, figure in results.measured("parity").items():
        verdict = "**red**" if figure["red"] else "green"
        rows.append([name, str(len(figure["checks"])), f"{figure['worst']:.1e}", verdict])
    return rows if len(rows) > 1 else []


SECTION = Section(
    name="parity",
    title="Parity: outputs and gradients against float64",
    order=10,
    budget_s=170,
    parts=parts,
    table=table,
)
