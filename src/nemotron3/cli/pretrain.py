"""`nemotron3 pretrain`: a recipe by name, from a file, or from a record."""

import argparse
import logging
from dataclasses import replace
from pathlib import Path

from nemotron3.cli.overrides import override
from nemotron3.cli.progress import watch
from nemotron3.cli.recipes import with_recipes
from nemotron3.config import read_run
from nemotron3.data import CorpusConfig, FilesConfig, PhaseConfig
from nemotron3.errors import ConfigError
from nemotron3.recipes.initial_model import continued
from nemotron3.recipes.load import load_recipe
from nemotron3.recipes.pretrain import PretrainRun
from nemotron3.recipes.run_pretrain import PretrainSummary, pretrain


def pretrain_command(known: argparse.Namespace, rest: list[str]) -> int:
    """Train by a recipe, with the values that the command line changes."""
    recipe = rest.pop(0) if rest and not rest[0].startswith("-") else None
    if recipe is None and known.replay is None:
        if rest or known.data or known.init_from:
            raise ConfigError(
                "no recipe; name it first, as in: nemotron3 pretrain tiny --name mine"
            )
        print(with_recipes(known.page(), PretrainRun))
        return 0
    run = _base_run(recipe, known.replay)
    if known.init_from is not None:
        run = continued(run, known.init_from)
    if known.data:
        run = _with_own_text(run, known.data)
    options = [*rest, "--help"] if known.help else rest
    prog = f"nemotron3 pretrain {recipe or '--from RUN.JSON'}"
    run = override(run, options, prog=prog, other_options=["--data", "--init-from"])
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    with watch() as callback:
        summary = pretrain(run, runs=known.runs, callback=callback, replay=known.replay)
    print(result_text(summary, run, known.runs / run.name))
    return 0


def _base_run(recipe: str | None, replay: Path | None) -> PretrainRun:
    if replay is None:
        assert recipe is not None
        return load_recipe(recipe, PretrainRun)
    if recipe is not None:
        raise ConfigError(f"give a recipe ({recipe!r}) or --from {replay}, not both")
    return read_run(replay, PretrainRun)


def _with_own_text(run: PretrainRun, paths: list[str]) -> PretrainRun:
    names = ["own-text"] if len(paths) == 1 else [f"own-text-{n + 1}" for n in range(len(paths))]
    sources = tuple(
        FilesConfig(path=path, name=name) for path, name in zip(paths, names, strict=True)
    )
    corpus = run.corpus
    if not isinstance(corpus, CorpusConfig):
        corpus = CorpusConfig(sources=sources, tokenizer=corpus.tokenizer)
    # A blend names the recipe's sources, and the prompts are in the manner of their text.
    return replace(
        run,
        name=f"{run.name}-own-text",
        corpus=replace(corpus, sources=sources),
        phases=(PhaseConfig(),),
        prompts=(),
    )


def result_text(summary: PretrainSummary, run: PretrainRun, folder: Path) -> str:
    """What a finished run has to show, for a terminal."""
    lines = [""]
    for sample in summary.samples:
        lines += [*sample_lines(sample), ""]
    lines += [
        *comparison_lines(summary, run.name),
        f"  held out: {summary.held_out_share:.1%} of the text, {summary.held_out_bytes:,} bytes",
        "",
        f"{summary.parameters / 1e6:.1f}M parameters "
        f"({summary.active_parameters / 1e6:.1f}M active), "
        f"{summary.tokens / 1e6:.2f}M tokens, {summary.seconds / 60:.1f} minutes",
        f"  model    {folder / 'model'}",
        f"  metrics  {folder / 'metrics.jsonl'}",
        f"  report   {folder / 'report.html'}",
        "",
        f'try: nemotron3 generate {folder / "model"} "Once more"',
    ]
    return "\n".join(lines)


def sample_lines(sample: dict[str, str]) -> list[str]:
    """The prompt and the beginning of its continuation."""
    text = (sample["prompt"] + "\u2502" + sample["text"]).rstrip()
    return ["  \u2502 " + line for line in text.splitlines()[:9]]


def comparison_lines(summary: PretrainSummary, name: str) -> list[str]:
    """Bits per byte of the model and of the baselines, as a table with bars."""
    compared = summary.compared | {f"{name} (this model)": summary.bits_per_byte}
    lines = ["bits per byte of held-out text (less is better)"]
    widest = max(compared.values())
    for label, bits in sorted(compared.items(), key=lambda item: -item[1]):
        bar = "\u2588" * round(32 * bits / widest)
        lines.append(f"  {label:<24}{bits:6.3f}  {bar}")
    return lines
