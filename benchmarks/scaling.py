"""Training speed as a function of sequence length, number of experts, and experts per token.

    python -m benchmarks.scaling [--model 30m-latent]

One quantity changes at a time, and every step has the same number of tokens. The measured speed is
plotted with the speed that the FLOPs predict from the first point. Longer sequences should slow
down only attention, more experts only the optimizer and the reading of weights, more experts per
token only the routed products. It writes JSON and a plot to benchmarks/results/.
"""

import argparse
import json
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any

from benchmarks.cpu import RESULTS
from benchmarks.drawing import pyplot
from benchmarks.limits import training_flops
from benchmarks.models import configs, tokens_of
from benchmarks.timing import interleave
from benchmarks.workloads import training

from benchmarks import machine
from nemotron3.models.config import ModelConfig
from nemotron3.models.nemotron_h import LanguageModel
from nemotron3.runtime.malloc import retain_freed_memory

AXES = {
    "sequence length": (256, 512, 1024, 2048, 4096),
    "experts": (16, 32, 64, 128),
    "experts per token": (1, 2, 4, 8, 16),
}
LENGTH = 512
"""Tokens per sequence when another quantity changes."""


def varied(config: ModelConfig, axis: str, value: int) -> tuple[ModelConfig, int]:
    """The configuration and the sequence length of a point."""
    assert config.moe is not None
    if axis == "sequence length":
        return config, value
    field = "n_routed_experts" if axis == "experts" else "num_experts_per_tok"
    return replace(config, moe=replace(config.moe, **{field: value})), LENGTH


def measure_axis(
    config: ModelConfig, axis: str, values: tuple[int, ...], *, tokens: int, repeats: int
) -> list[dict[str, Any]]:
    """Tokens per second at each value, measured in turns."""
    contestants, flops = {}, {}
    for value in values:
        point, length = varied(config, axis, value)
        assert tokens % length == 0, f"{tokens} tokens are no whole number of {length}"
        batch = tokens_of(point, tokens // length, length)
        contestants[str(value)] = training(LanguageModel.from_config(point), batch)
        flops[value] = training_flops(point, length=length)
    samples = interleave(contestants, repeats=repeats)
    rates = {value: samples[str(value)].rate(tokens) for value in values}
    first = values[0]
    return [
        {
            "value": value,
            "tokens_per_s": rates[value],
            "by_flops": rates[first]["median"] * flops[first] / flops[value],
        }
        for value in values
    ]


def draw(result: dict[str, Any], out: Path) -> None:
    """Plot one panel for each axis."""
    plt = pyplot()
    figure, panels = plt.subplots(
        1, len(result["axes"]), figsize=(9.2, 3.0), sharey=True, layout="constrained"
    )
    for panel, (axis, points) in zip(panels, result["axes"].items(), strict=True):
        at = [point["value"] for point in points]
        rates = [point["tokens_per_s"] for point in points]
        low, high = ([rate[end] for rate in rates] for end in ("min", "max"))
        panel.fill_between(at, low, high, color="#2e70de", alpha=0.2, linewidth=0)
        panel.plot(at, [r["median"] for r in rates], "o-", color="#2e70de", label="measured")
        by_flops = [point["by_flops"] for point in points]
        panel.plot(at, by_flops, "--", color="#7d838c", label="by FLOPs alone")
        panel.set_xscale("log", base=2)
        panel.set_xticks(at, [str(value) for value in at])
        panel.minorticks_off()
        panel.set_xlabel(axis)
        panel.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylim(bottom=0)  # after all are drawn: it ends the fitting of the axis they share
    panels[0].set_ylabel("tokens/s, training step")
    panels[0].legend(frameon=False, loc="lower left")
    figure.savefig(out, format="svg", metadata={"Date": None}, facecolor="white")
    plt.close(figure)


def main(
    arguments: list[str] | None = None, axes: dict[str, tuple[int, ...]] | None = None
) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", choices=list(configs()), default="30m-latent")
    parser.add_argument("--tokens", type=int, default=4096, help="tokens per step")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for JSON and SVG")
    options = parser.parse_args(arguments)
    retain_freed_memory()  # as training does
    load = machine.load_average()
    machine.warn_if_busy(load)
    result: dict[str, Any] = {
        "command": machine.command("benchmarks.scaling"),
        "date": date.today().isoformat(),
        "model": options.model,
        "tokens": options.tokens,
        "axes": {},
    }
    for axis, values in (axes or AXES).items():
        points = measure_axis(
            configs()[options.model], axis, values, tokens=options.tokens, repeats=options.repeats
        )
        result["axes"][axis] = points
        for point in points:
            rate = point["tokens_per_s"]
            span = f"{rate['median']:.0f} ({rate['min']:.0f}-{rate['max']:.0f}) tokens/s"
            print(f"{axis:18}{point['value']:6}  {span:32}by FLOPs {point['by_flops']:.0f}")
    result["machine"] = machine.description() | {
        "load_before": load,
        "load_after": machine.load_average(),
    }
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / f"scaling-{result['date']}.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    draw(result, path.with_suffix(".svg"))
    print(path)


if __name__ == "__main__":
    main()
