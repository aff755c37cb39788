"""`nemotron3 sft`: fine-tuning by a recipe, or of a model on own conversations."""

import argparse
import logging
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from nemotron3.cli.overrides import override
from nemotron3.cli.progress import watch
from nemotron3.config import read_run
from nemotron3.data.conversations import ConversationsConfig
from nemotron3.errors import ConfigError
from nemotron3.models.huggingface.companions import CONFIG_FILE
from nemotron3.recipes.load import load_recipe
from nemotron3.recipes.own_conversations import own_conversations
from nemotron3.recipes.run_sft import SFTSummary, sft
from nemotron3.recipes.sft import SFTRun
from nemotron3.recipes.sft_data import SFTData, prepare_sft_data

_TRAINED, _PLAIN, _END = "\033[32m", "\033[2m", "\033[0m"


def sft_command(known: argparse.Namespace, rest: list[str]) -> int:
    """Fine-tune, with the values that the command line changes."""
    what = rest.pop(0) if rest and not rest[0].startswith("-") else None
    if what is None and known.replay is None:
        if rest or known.data:
            raise ConfigError(
                "no model; name it first, as in: nemotron3 sft runs/tiny/model --data chats.jsonl"
            )
        print(known.page())
        return 0
    run = _base_run(what, known)
    options = [*rest, "--help"] if known.help else rest
    run = override(run, options, prog=f"nemotron3 sft {what or '--from RUN.JSON'}")
    if known.preview:
        print(preview(prepare_sft_data(run), rows=known.preview))
        return 0
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    with watch() as callback:
        summary = sft(run, runs=known.runs, callback=callback)
    print(result_text(summary, known.runs / run.name))
    return 0


def _base_run(what: str | None, known: argparse.Namespace) -> SFTRun:
    if known.replay is not None:
        if what is not None:
            raise ConfigError(f"give a recipe or model ({what!r}) or --from, not both")
        return read_run(known.replay, SFTRun)
    assert what is not None
    is_model = (Path(what) / CONFIG_FILE).is_file()
    if not is_model and Path(what).is_dir():
        raise ConfigError(
            f"{what} holds no {CONFIG_FILE}; give a model directory, such as {what}/model"
        )
    if is_model:
        if not known.data:
            raise ConfigError(
                f"{what} is a model; say what it is trained on, as in: --data chats.jsonl"
            )
        return own_conversations(what, _sources(known.data), epochs=known.epochs)
    run = load_recipe(what, SFTRun)
    return replace(run, data=_sources(known.data)) if known.data else run


def _sources(given: list[str]) -> tuple[ConversationsConfig, ...]:
    """PATH or PATH=WEIGHT."""
    found: list[ConversationsConfig] = []
    for text in given:
        path, equals, weight = text.rpartition("=")
        try:
            parts = (path, float(weight)) if equals else (text, 1.0)
        except ValueError:
            parts = (text, 1.0)
        found.append(ConversationsConfig(path=parts[0], weight=parts[1]))
    return tuple(found)


def preview(data: SFTData, *, rows: int) -> str:
    """The first conversations of each source as the model reads them, the trained text coloured."""
    lines: list[str] = []
    for name, source in data.train.items():
        for number, conversation in enumerate(source.conversations[:rows]):
            trained = int(conversation.is_target.sum())
            lines.append(
                f"{name}, conversation {number + 1}: {len(conversation)} tokens, {trained} trained"
            )
            lines.append(_coloured(data, conversation.ids.tolist(), conversation.is_target))
            lines.append("")
    lines.append(f"{_TRAINED}green{_END} is trained, {_PLAIN}dim{_END} is context")
    return "\n".join(lines)


def _coloured(data: SFTData, ids: list[int], is_target: NDArray[np.bool_]) -> str:
    text, start = "", 0
    for end in range(1, len(ids) + 1):
        if end == len(ids) or is_target[end] != is_target[start]:
            colour = _TRAINED if is_target[start] else _PLAIN
            text += f"{colour}{data.tokenizer.decode(ids[start:end])}{_END}"
            start = end
    return text


def result_text(summary: SFTSummary, folder: Path) -> str:
    """What a finished run has to show, for a terminal."""
    lines = [""]
    for sample in summary.samples:
        lines += [
            f"  user       {_short(sample['prompt'])}",
            f"  expected   {_short(sample['expected'])}",
            f"  model      {_short(sample['text'])}",
            "",
        ]
    lines.append("held-out loss, nats per trained token (less is better)")
    lines.append(f"  {'source':<24}{'before':>8}{'after':>8}")
    for name, after in summary.loss.items():
        before = summary.loss_before.get(name)
        lines.append(f"  {name:<24}{before or float('nan'):8.3f}{after:8.3f}")
    lines += [
        f"  first choice right: {summary.accuracy:.1%} of held-out tokens; the best model is that "
        f"of step {summary.best_step}",
        "",
        f"{summary.parameters / 1e6:.1f}M parameters, {sum(summary.conversations.values()):,} "
        f"conversations, {summary.seconds / 60:.1f} minutes",
        f"  model    {folder / 'model'}",
        f"  report   {folder / 'report.html'}",
        "",
        f"try: nemotron3 chat {folder / 'model'}",
    ]
    return "\n".join(lines)


def _short(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= 100 else line[:97] + "..."
