"""The drift of narrow states: the error of each precision over thousands of decoding steps.

    python -m benchmarks.state_drift [MODEL] [--steps 4096] [--streams 4]

There are three measurements, from the smallest part to the whole model. Results go to
benchmarks/results/ as JSON, the plot to docs/assets/state-drift.svg.

* bits: the correlation of the random bits between one position and the next, by rounds of Philox,
  with the position in the third word of the counter (as in the package) and in the second;
* scan: h <- a h + x with random x, stored in each precision: the error relative to the exact state,
  for decays a from 0.99 to 0.99999. The time constant of the last is a hundred thousand tokens;
* model: a trained MODEL generates text in float32, and processes the same text token by token with
  its state in each precision: the KL divergence of its next-token distributions from float32's, how
  often the most probable token is the same, and the error of the states.
"""

import argparse
import json
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch
from benchmarks.drawing import pyplot
from torch import Tensor

from nemotron3.models.cache.state_format import StateFormat
from nemotron3.models.cache.state_precision import StatePrecision
from nemotron3.models.nemotron_h import LanguageModel
from nemotron3.ops.rounding.bits import RandomBits, philox, sixteen_bits

ROOT = Path(__file__).parent.parent
PICTURE = ROOT / "docs" / "assets" / "state-drift.svg"
STATES = {
    "float16, to the nearest": StatePrecision(ssm="float16", rounding="nearest"),
    "float16, stochastic, 3 rounds": StatePrecision(ssm="float16", philox_rounds=3),
    "float16, stochastic, 5 rounds": StatePrecision(ssm="float16"),
    "float16, stochastic, 10 rounds": StatePrecision(ssm="float16", philox_rounds=10),
    "int8, to the nearest": StatePrecision(ssm="int8", rounding="nearest"),
    "int8, stochastic": StatePrecision(ssm="int8"),
}
KEYS = {
    "float8 keys": StatePrecision(keys="float8"),
    "float16, stochastic, and float8 keys": StatePrecision(ssm="float16", keys="float8"),
}
COLOURS = ("#d9642c", "#8c9096", "#2e70de", "#8fb4f0", "#b3261e", "#2b9a66", "#8a63d2", "#3b4048")
DECAYS = (0.99, 0.999, 0.9999, 0.99999)
PARTS = 8
"""Parts of the stream; the model's figures are averaged over each."""


def bits() -> list[dict]:
    """Correlation of an element's bits between consecutive positions."""
    rows = []
    for rounds in (3, 4, 5, 6, 10):
        third = sixteen_bits(4096, _at(128), RandomBits(0, 3, rounds))
        zero = torch.zeros(128, 512, dtype=torch.int64)
        element, position = torch.broadcast_tensors(torch.arange(512), _at(128).unsqueeze(1))
        words = philox([element, position, zero, zero], (0, 3), rounds)
        second = torch.cat([half for w in words for half in (w & 0xFFFF, w >> 16)], 1)
        rows.append(
            {
                "rounds": rounds,
                "third word": _neighbours(third),
                "second": _neighbours(second),
            }
        )
    return rows


def _at(count: int) -> Tensor:
    return torch.arange(1000, 1000 + count)


def _neighbours(drawn: Tensor) -> float:
    noise = (drawn.double() - 32767.5) / (65536 / 12**0.5)
    return float((noise[1:] * noise[:-1]).mean())


def scan(steps: int) -> list[dict]:
    """Relative errors of the recurrence alone, over the steps."""
    rows = []
    decays = torch.tensor(DECAYS, dtype=torch.float32).view(1, -1, 1, 1)
    shape = (1, len(DECAYS), 16, 128)  # a head for each decay
    for name, precision in STATES.items():
        generator = torch.Generator().manual_seed(0)
        form = StateFormat(precision, 0, torch.float32)
        exact = torch.zeros(shape, dtype=torch.float64)
        kept = form.zeros(*shape, device=torch.device("cpu"))
        marks, errors = [], []
        for t in range(steps):
            # As with small steps dt: the input is small if the decay is slow.
            x = (1 - decays) * (1 + torch.randn(shape, generator=generator))
            exact = decays.double() * exact + x.double()
            kept = form.quantize(decays * form.dequantize(kept) + x, torch.tensor([t + 1]))
            if (t + 1) & t == 0 or (t + 1) % (steps // 16) == 0:
                off = (form.dequantize(kept).double() - exact).square().sum((0, 2, 3))
                marks.append(t + 1)
                errors.append((off / exact.square().sum((0, 2, 3))).sqrt().tolist())
        rows.append({"state": name, "steps": marks, "decays": DECAYS, "errors": errors})
    return rows


@torch.inference_mode()
def model_drift(path: Path, steps: int, streams: int) -> list[dict]:
    """Figures of the model's own text, processed again in each precision."""
    model = LanguageModel.from_pretrained(path, dtype=torch.float32).eval()
    tokens = write(model, steps, streams)
    every = STATES | KEYS
    wide, narrow = model.new_state(streams), [model.new_state(streams, p) for p in every.values()]
    kl, same = torch.zeros(len(every), steps), torch.zeros(len(every), steps)
    states = torch.zeros(len(every), PARTS)
    for t in range(steps):
        exact = _step(model, wide, tokens[t])
        for i, cache in enumerate(narrow):
            logprobs = _step(model, cache, tokens[t])
            kl[i, t] = (exact.exp() * (exact - logprobs)).sum(-1).mean()
            same[i, t] = (exact.argmax(-1) == logprobs.argmax(-1)).float().mean()
            if (t + 1) % (steps // PARTS) == 0:
                states[i, t * PARTS // steps] = _distance(cache, wide)
    return [
        {
            "state": name,
            "kl": float(kl[i].mean()),
            "same_top_1": float(same[i].mean()),
            "kl_by_part": kl[i].unflatten(0, (PARTS, -1)).mean(1).tolist(),
            "state_error_by_part": states[i].tolist(),
        }
        for i, name in enumerate(every)
    ]


def write(model: LanguageModel, steps: int, streams: int) -> Tensor:
    """Text sampled from the model at temperature 1, [steps, streams]."""
    generator = torch.Generator().manual_seed(1)
    cache, tokens = model.new_state(streams), [torch.ones(streams, dtype=torch.int64)]
    while len(tokens) < steps:
        probabilities = _step(model, cache, tokens[-1]).exp().float()
        tokens.append(torch.multinomial(probabilities, 1, generator=generator).squeeze(1))
    return torch.stack(tokens)


def _step(model: LanguageModel, cache: Any, tokens: Tensor) -> Tensor:
    layout = cache.layout([1] * len(tokens))
    return model(tokens, layout=layout, state=cache).double().log_softmax(-1)


def _distance(cache: Any, wide: Any) -> float:
    """Relative distance of the SSM states from those in float32, over all Mamba layers."""
    off = size = 0.0
    for mine, exact in zip(cache.layers, wide.layers, strict=True):
        if hasattr(exact, "format"):
            slots = torch.arange(len(wide.lengths))
            states = exact.format.dequantize(
                tuple(part[slots] for part in exact.ssm_states)
            ).double()
            kept = mine.format.dequantize(tuple(part[slots] for part in mine.ssm_states)).double()
            off += float((kept - states).square().sum())
            size += float(states.square().sum())
    return (off / size) ** 0.5


def draw(results: dict) -> None:
    """Plot the error of the recurrence and the divergence of the model over the steps."""
    plt = pyplot()
    figure, (left, right) = plt.subplots(1, 2, figsize=(9.2, 3.6), layout="constrained")
    colours = dict(zip([*STATES, *KEYS], COLOURS, strict=True))
    at = DECAYS.index(0.9999)
    for row in results["scan"]:
        errors = [of_decays[at] for of_decays in row["errors"]]
        left.loglog(row["steps"], errors, label=row["state"], color=colours[row["state"]])
    left.set(xlabel="steps", ylabel="relative error of the state")
    left.set_title("h ← 0.9999 h + x", loc="left")
    width = results["steps"] // PARTS
    for row in results["model"]:
        places = [width * (part + 0.5) for part in range(PARTS)]
        right.semilogy(places, row["kl_by_part"], label=row["state"], color=colours[row["state"]])
    right.set(xlabel="position", ylabel="KL from float32 (nats)")
    right.set_title("the tiny model", loc="left")
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    handles, labels = right.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False, fontsize=8)
    figure.savefig(PICTURE, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", nargs="?", type=Path, default=ROOT / "runs" / "tiny" / "model")
    parser.add_argument("--steps", type=int, default=4096)
    parser.add_argument("--streams", type=int, default=4)
    parser.add_argument("--scan-steps", type=int, default=32768)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/state-drift.json")
    known = parser.parse_args()
    revision = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False
    ).stdout.strip()
    results = {
        "commit": revision,
        "machine": platform.processor() or platform.machine(),
        "torch": torch.__version__,
        "steps": known.steps,
        "streams": known.streams,
        "bits": bits(),
        "scan": scan(known.scan_steps),
        "model": model_drift(known.model, known.steps, known.streams),
    }
    known.out.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    draw(results)
    for row in results["bits"]:
        print(f"{row['rounds']:3} rounds: {row['third word']:+.3f} {row['second']:+.3f}")
    for row in results["scan"]:
        print(f"{row['state']:38}", *(f"{error:9.1e}" for error in row["errors"][-1]))
    for row in results["model"]:
        parts, error = row["kl_by_part"], row["state_error_by_part"][-1]
        print(f"{row['state']:38} {row['kl']:9.1e} {parts[0]:9.1e} {parts[-1]:9.1e} "
              f"{row['same_top_1']:8.2%} {error:9.1e}")  # fmt: skip


if __name__ == "__main__":
    main()
