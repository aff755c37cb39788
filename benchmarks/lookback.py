"""The keys to which later drafts should attend: four alternatives, on held-out text.

    python -m benchmarks.lookback runs/tiny/model

In training each depth of multi-token prediction attends to keys of its own depth. While drafting,
these would have to be stored and corrected for every depth; the first depth's exist anyway. At
every position of the text and for each alternative, the drafts of four depths are compared with the
model's own choices. A draft counts if those before it were accepted and the text continues with the
model's choices.

    own        keys of its own depth everywhere, as in training
    append     the first depth's, followed by those of the drafts before it
    overwrite  the first depth's, with the last one replaced by its own
    behind     the first depth's, followed by its own
"""

import argparse
import datetime
import json
from pathlib import Path

import torch
from benchmarks.cpu import RESULTS
from benchmarks.machine import command, description
from benchmarks.speculation import held_out_of
from torch import Tensor

from nemotron3 import LanguageModel
from nemotron3.models.cache.hybrid_cache import HybridCache
from nemotron3.models.layout import MAX_STEPS, SequenceLayout
from nemotron3.ops.segments import Segments

DEPTHS = 4
FIRST = 16
"""Positions at the start of a row that do not count, since they have few keys."""


def as_trained(model: LanguageModel, ids: Tensor, hidden: Tensor) -> list[Tensor]:
    """Drafts of all depths at every position, [rows, length] each, with keys of their own depth."""
    assert model.mtp is not None
    guesses: list[Tensor] = []
    state, layout = hidden.flatten(0, 1), SequenceLayout.of(ids)
    for depth in range(1, DEPTHS + 1):
        state, _ = model.mtp(model.embed(ids.roll(-depth, 1).flatten()), state, layout)
        guesses.append(model.logits(state).argmax(-1).view(ids.shape))
    return guesses


def as_drafted(model: LanguageModel, ids: Tensor, hidden: Tensor, way: str) -> list[Tensor]:
    """The same with the first depth's keys, position by position."""
    rows, length = ids.shape
    cache = HybridCache(
        model.config,
        slots=rows,
        dtype=hidden.dtype,
        device=model.device,
        max_length=length + MAX_STEPS,
        drafts=True,
    )
    for slot in range(rows):
        cache.reserve(slot, length + MAX_STEPS)
    mtp = model.mtp
    assert mtp is not None

    def draft(tokens: Tensor, state: Tensor, context: int) -> Tensor:
        layout = SequenceLayout(
            Segments([1] * rows), cached_lengths=(context,) * rows, slots=tuple(range(rows))
        )
        return mtp(model.embed(tokens), state, layout, cache.draft_layers)[0]

    guesses = [torch.zeros_like(ids) for _ in range(DEPTHS)]
    for at in range(length - 1 - DEPTHS):
        state = draft(ids[:, at + 1], hidden[:, at], at)
        guesses[0][:, at] = model.logits(state).argmax(-1)
        for depth in range(2, DEPTHS + 1):
            context = {"append": at + depth - 1, "overwrite": at, "behind": at + 1}[way]
            state = draft(ids[:, at + depth], state, context)
            guesses[depth - 1][:, at] = model.logits(state).argmax(-1)
        if way == "overwrite":
            draft(ids[:, at + 1], hidden[:, at], at)
    return guesses


def count(guesses: list[Tensor], best: Tensor, ids: Tensor) -> list[tuple[int, int]]:
    """For each depth, how many drafts were tried and how many were accepted."""
    last = ids.shape[1] - 1 - DEPTHS
    stands = torch.ones_like(ids[:, FIRST:last], dtype=torch.bool)
    counts: list[tuple[int, int]] = []
    for depth in range(1, DEPTHS + 1):
        chosen = best[:, FIRST + depth : last + depth]
        right = guesses[depth - 1][:, FIRST:last] == chosen
        counts.append((int(stands.sum()), int((stands & right).sum())))
        stands = stands & right & (chosen == ids[:, FIRST + depth + 1 : last + depth + 1])
    return counts


@torch.inference_mode()
def measure(folder: Path, *, rows: int, length: int = 256) -> dict[str, list[float]]:
    """Acceptance of each depth over all sources, by alternative."""
    model = LanguageModel.from_pretrained(folder).eval()
    totals: dict[str, list[list[int]]] = {}
    for file in held_out_of(folder)[1].values():
        starts = torch.linspace(0, file.num_tokens - length - 1, rows).long().tolist()
        ids = torch.stack([torch.tensor(file.tokens[s : s + length].tolist()) for s in starts])
        hidden = model.backbone(model.embed(ids.flatten()), SequenceLayout.of(ids)).hidden
        best = model.logits(hidden).argmax(-1).view(ids.shape)
        hidden = hidden.view(*ids.shape, -1)
        guesses = {"own": as_trained(model, ids, hidden)} | {
            way: as_drafted(model, ids, hidden, way) for way in ("append", "overwrite", "behind")
        }
        for way, each in guesses.items():
            total = totals.setdefault(way, [[0, 0] for _ in range(DEPTHS)])
            for place, counts in enumerate(count(each, best, ids)):
                total[place] = [t + c for t, c in zip(total[place], counts, strict=True)]
    return {way: [stood / max(tried, 1) for tried, stood in t] for way, t in totals.items()}


def main() -> None:
    """Measure, write the results, and print them."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", type=Path, help="model folder of a run, as in runs/tiny/model")
    parser.add_argument("--rows", type=int, default=16, help="stretches of each source")
    arguments = parser.parse_args()
    name = arguments.model.resolve().parent.name
    acceptance = measure(arguments.model, rows=arguments.rows)
    for way, each in acceptance.items():
        print(f"{way:10}" + "  ".join(f"{value:.1%}" for value in each))
    date = datetime.datetime.now(datetime.UTC).date().isoformat()
    result = {
        "command": command("benchmarks.lookback"),
        "date": date,
        "machine": description(),
        "rows": arguments.rows,
        "acceptance": acceptance,
    }
    file = RESULTS / f"lookback-{name}-{date}.json"
    file.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
