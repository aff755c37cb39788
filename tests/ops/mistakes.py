"""Give every operation all kinds of wrong operands; it runs as a program, because it may crash.

A mistake must raise the same named error on each backend. Valid unusual operands (a narrow weight
that is converted, int32 indices, memory that is not contiguous) must give the same values. It
prints "passed" and the name of each operation that passed, and failures as they happen.
"""

import faulthandler
import sys
import traceback
from typing import Any

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from nemotron3.errors import BackendUnavailableError, OperandError, OperandIndexError
from tests.ops.catalogue import OPERATIONS, Operands, Operation
from tests.tolerances import BFLOAT16

FLOATS = (torch.float64, torch.bfloat16, torch.float16)
INTEGERS = (torch.int64, torch.int32, torch.int8, torch.uint8, torch.bool)
BEYOND = (-1, -100, 9, 11, 10**7, 2**40)
EXPECTED = (OperandError, OperandIndexError, ValueError)


def changed(t: Tensor) -> list[tuple[str, Tensor]]:
    """Tensors like `t` but for one thing."""
    dtypes = (*FLOATS, *INTEGERS) if t.is_floating_point() else (torch.float32, *INTEGERS)
    others = [(f"in {dtype}", t.to(dtype)) for dtype in dtypes if dtype != t.dtype]
    others += [
        ("with an axis more", t.unsqueeze(0)),
        ("with one axis", t.flatten()),
        ("a number", t.sum().to(t.dtype)),
        ("on another device", t.to("meta")),
        ("transposed", t.transpose(0, -1)),
        ("apart in memory", torch.stack([t, t], -1)[..., 0]),
        ("turned in memory", t.transpose(0, -1).contiguous().transpose(0, -1)),
    ]
    for axis in range(t.dim()):
        wider = torch.cat([t, t.narrow(axis, 0, min(1, t.shape[axis]))], axis)
        others += [(f"wider in axis {axis}", wider)]
        if t.shape[axis]:
            others += [
                (f"narrower in axis {axis}", t.narrow(axis, 0, t.shape[axis] - 1)),
                (f"nothing in axis {axis}", t.narrow(axis, 0, 0)),
            ]
        if t.shape[axis] and t.is_floating_point():  # two sequences in one place are a race
            others += [(f"the same all along axis {axis}", t.narrow(axis, 0, 1).expand_as(t))]
    if t.dtype == torch.int64 and t.numel():
        for value in BEYOND:
            if (t == value).any():  # a page that another sequence has: a race as well
                continue
            spoilt = t.clone()
            spoilt.view(-1)[-1] = value
            others.append((f"holding {value}", spoilt))
    return others


def variations(operation: Operation, operands: Operands, name: str) -> list[tuple[str, Any]]:
    """(how, value) for each change of one operand."""
    value = operands[name]
    found: list[tuple[str, Any]] = changed(value) if isinstance(value, Tensor) else []
    return found + [(f"= {wrong}", wrong) for wrong in operation.numbers.get(name, ())]


def outcome(operation: Operation, operands: Operands, backend: str) -> Any:
    """The error, or all results."""
    given = {
        name: v.clone() if name in operation.written and v.is_contiguous() else v
        for name, v in operands.items()
    }
    try:
        results = operation.call(backend=backend, **given)
    except (*EXPECTED, BackendUnavailableError) as error:
        return error
    if isinstance(results, Tensor):
        results = [results]
    return [*(results or ()), *(given[name] for name in operation.written)]


def compare(found: Any, expected: Any, what: str, *, of_bfloat16: bool) -> None:
    if isinstance(expected, Exception):
        assert type(found) is type(expected), f"{what}: {found!r} and not {expected!r}"
        assert str(found) == str(expected), what
        return
    assert not isinstance(found, Exception), f"{what}: {found!r}"
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == b.dtype, what
        close = {"rtol": 2e-5, "atol": 2e-5} if a.dtype in (torch.float32, torch.float64) else {}
        if of_bfloat16 and a.is_floating_point() and b.numel():  # each rounds at its own places
            finite = b.float().nan_to_num(0.0, 0.0, 0.0)
            close = {"rtol": 0.0, "atol": 2 * BFLOAT16 * max(1.0, finite.abs().max().item())}
        torch.testing.assert_close(a, b, equal_nan=True, **close, msg=lambda m: f"{what}: {m}")


def try_operation(name: str) -> None:
    operation = OPERATIONS[name]

    @settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
    @given(st.sampled_from(operation.sizes), st.integers(0, 2**32), st.data())
    def run(tokens: int, seed: int, data: st.DataObject) -> None:
        torch.manual_seed(seed)
        operands = operation.operands(tokens)
        operand = data.draw(st.sampled_from(sorted(operands)))
        for how, value in variations(operation, operands, operand):
            what = f"{name} of {tokens}, {operand} {how}"
            say(what)
            spoilt = operands | {operand: value}
            narrow = any(getattr(v, "dtype", None) == torch.bfloat16 for v in spoilt.values())
            with torch.inference_mode():
                expected = outcome(operation, spoilt, "torch")
                compare(outcome(operation, spoilt, "auto"), expected, what, of_bfloat16=narrow)
                forced = outcome(operation, spoilt, "native")
                if not isinstance(forced, BackendUnavailableError):
                    compare(forced, expected, what, of_bfloat16=narrow)

    run()


def say(line: str) -> None:
    """Print without buffering, since the process may crash."""
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def main() -> None:
    faulthandler.enable()
    torch.set_num_threads(2)
    for name in OPERATIONS:
        try:
            try_operation(name)
        except Exception:  # noqa: BLE001 - the others are to be tried as well
            traceback.print_exc()
        else:
            say(f"passed {name}")


if __name__ == "__main__":
    main()
