"""Nano and the transformer it is compared with: whole models with random weights on one device.

A decoding step must read the weights that its tokens use (of the experts, those that any token of
the batch chose), all cached keys and values, and read and write the states; the share is that of
the copy bandwidth. Products limit the prefill; its share is that of the product rate.

The last rows combine the measured parts to the white paper's comparison: prompts of 8,192 tokens
and answers of 16,384, each model at its best batch size. They are computed from steps and not
measured on a server. The authors report a factor of 3.3 for Nano, for whole requests on an H200.
"""

from functools import partial

from benchmarks.gpu import whole_models
from benchmarks.gpu.figures import NONE, milliseconds, share
from benchmarks.gpu.record import Results
from benchmarks.gpu.section import Part, Rows, Section
from benchmarks.gpu.setting import Setting

NAMES = ("nano", "qwen3-moe")
PROMPT, ANSWER = 8192, 16_384
_GOAL = "3.3x"


def parts(setting: Setting, name: str) -> dict[str, Part]:
    found: dict[str, Part] = {"weights": partial(whole_models.size, name, setting)}
    lengths = (8, 24) if setting.is_toy else (PROMPT, 131_072 if name == "nano" else 32_768)
    prompt, answer = (8, 16) if setting.is_toy else (PROMPT, ANSWER)
    cells = [(batch, context) for context in (prompt, prompt + answer) for batch in _batches(name)]
    others = (1024, 131_072) if name == "nano" else (1024,)
    cells += [(batch, context) for context in others for batch in (1, 8, 32, 128)]
    if setting.is_toy:
        cells = [(batch, context) for context in (prompt, prompt + answer) for batch in (1, 2)]
    first, *rest = lengths
    found[_prompt(first)] = partial(whole_models.prefill, name, first, setting)
    for batch, context in cells:
        words = f"step, batch {batch}, context {context:,}"
        found[words] = partial(whole_models.decoding, name, batch, context, setting)
    for length in rest:
        found[_prompt(length)] = partial(whole_models.prefill, name, length, setting)
    return found


def _prompt(length: int) -> str:
    return f"prompt of {length:,}"


def _batches(name: str) -> tuple[int, ...]:
    """Batch sizes; one that does not fit in memory with the weights is reported as left out."""
    return (1, 8, 32, 128, 320) if name == "nano" else (1, 4, 8, 16, 32)


def table(results: Results, name: str) -> Rows:
    rows = [["", "ms", "tokens/s", "of the limit"]]
    rate, bandwidth = results.limit("product_flops_per_s"), results.limit("copy_bytes_per_s")
    for part, figure in results.measured(name).items():
        if "weight_bytes" in figure:
            free = figure["free_bytes"]
            words = f"{figure['weight_bytes'] / 1e9:.1f} GB"
            left = NONE if free is None else f"{free / 1e9:.1f} GB free"
            rows.append([part, NONE, words, left])
            continue
        floor, tokens = _floor(figure, rate, bandwidth)
        seconds = figure["step"]["median_s"]
        rows.append(
            [
                part,
                milliseconds(figure["step"]),
                f"{tokens / seconds:,.0f}" if seconds else NONE,
                share(floor, seconds),
            ]
        )
    if len(rows) > 1 and name in NAMES:
        rows.append(_requests(results, name))
    return rows if len(rows) > 1 else []


def _floor(figure: dict, rate: float | None, bandwidth: float | None) -> tuple[float | None, int]:
    """The lower bound of the time, and the number of tokens."""
    if "batch" in figure:
        return bandwidth and figure["bytes"] / bandwidth, figure["batch"]
    return rate and figure["flops"] / rate, figure["length"] - figure.get("start", 0)


def _requests(results: Results, name: str) -> list[str]:
    """Whole requests computed from the parts, and Nano's ratio to the other model."""
    pieces = {model: _throughput(results, model) for model in NAMES}
    words = f"requests of {PROMPT:,} + {ANSWER:,}, computed"
    own = pieces[name]
    if own is None:
        return [words, NONE, NONE, NONE]
    made, batch = own
    other = pieces["qwen3-moe"]
    against = NONE
    if name == "nano" and other is not None and results.may_compare:
        against = f"{made / other[0]:.2f}x of qwen3-moe (paper: {_GOAL})"
    return [f"{words}, batch {batch}", NONE, f"{made:,.0f}", against]


def _throughput(results: Results, name: str) -> tuple[float, int] | None:
    return whole_models.throughput(results.measured(name), prompt=PROMPT, answer=ANSWER)


def section(name: str, *, order: int, budget_s: float) -> Section:
    """The section of one of the two models."""
    return Section(
        name=name,
        title=f"{name}: one whole model, bfloat16",
        order=order,
        budget_s=budget_s,
        parts=partial(parts, name=name),
        table=partial(table, name=name),
    )


SECTION = section("nano", order=20, budget_s=170)
