"""`nemotron3 sft`: fine-tuning by a recipe, or of a model on own conversations."""

import argparse
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from nemotron3.cli.recipes import with_recipes
from nemotron3.cli.tuning import chosen_run, ending, lora_of, watched, weighted
from nemotron3.data.conversations import ConversationsConfig
from nemotron3.errors import ConfigError
from nemotron3.recipes.own_conversations import own_conversations
from nemotron3.recipes.run_sft import SFTSummary, sft
from nemotron3.recipes.sft import SFTRun
from nemotron3.recipes.sft_data import SFTData, prepare_sft_data

_TRAINED, _PLAIN, _END = "\033[32m", "\033[2m", "\033[0m"


def sft_command(known: argparse.Namespace, rest: list[str]) -> int:
    """Fine-tune, with the values that the command line changes."""

    def of_model(model: str) -> SFTRun:
        if not known.data:
            raise ConfigError(
                f"{model} is a model; say what it is trained on, as in: --data chats.jsonl"
            )
        sources = [_source(text, known.max_bad_fraction) for text in known.data]
        options = {} if known.epochs is None else {"epochs": known.epochs}
        return own_conversations(model, sources, lora=lora_of(rest), **options)

    own = {
        "--data": known.data,
        "--epochs": known.epochs,
        "--max-bad-fraction": known.max_bad_fraction,
    }
    run = chosen_run(known, rest, SFTRun, of_model=of_model, of_model_only=own)
    if run is None:
        print(with_recipes(known.page(), SFTRun))
    elif known.preview:
        print(preview(prepare_sft_data(run), rows=known.preview))
    else:
        summary = watched(lambda callback: sft(run, runs=known.runs, callback=callback))
        print(result_text(summary, known.runs / run.name))
    return 0


def _source(text: str, max_bad_fraction: float | None) -> ConversationsConfig:
    path, weight = weighted(text)
    try:
        return ConversationsConfig(
            path=path, weight=weight, max_bad_fraction=max_bad_fraction or 0.0
        )
    except ConfigError as error:
        options = {
            "data.path": "--data",
            "data.weight": f"the weight of --data {path}",
            "data.max_bad_fraction": "--max-bad-fraction",
        }
        raise error.renamed(options) from error


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
        lines.append(f"  {name:<24}{summary.loss_before[name]:8.3f}{after:8.3f}")
    lines += [
        f"  first choice right: {summary.accuracy:.1%} of held-out tokens; the best model is that "
        f"of step {summary.best_step}",
        "",
        f"{summary.parameters / 1e6:.1f}M parameters, {sum(summary.conversations.values()):,} "
        f"conversations, {summary.seconds / 60:.1f} minutes",
        *ending(folder),
    ]
    return "\n".join(lines)


def _short(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= 100 else line[:97] + "..."
