"""Carrying out a pre-training run: corpus, model, training, and a look at the result.

Every part can be interrupted. The corpus stands or does not, training goes on from its last
checkpoint, and a run whose summary stands is finished and is only shown again.
"""

import json
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from nemotron3.checkpoint.store import CheckpointStore
from nemotron3.config import from_record, read_run, to_record, write_run
from nemotron3.data import (
    Batch,
    Corpus,
    Loader,
    PhaseSchedule,
    baseline_bits_per_byte,
    held_out_batches,
)
from nemotron3.data.fingerprint import in_words
from nemotron3.errors import ConfigError, DependencyMissingError
from nemotron3.models.accounting import model_costs
from nemotron3.models.nemotron_h import LanguageModel
from nemotron3.observe.metrics import MetricLog, MetricSink
from nemotron3.observe.report import ReportSummary, TextSample, write_report
from nemotron3.observe.sinks import JsonlSink, TensorBoardSink
from nemotron3.ops.backends import chosen_backends
from nemotron3.ops.linear import linear
from nemotron3.ops.segments import Segments
from nemotron3.parallel.devices import describe_device, measure_product_rate, resolve_device
from nemotron3.recipes.inputs import changes_since, open_inputs, replay_differences, write_inputs
from nemotron3.recipes.pretrain import TOKENIZER_FOLDER, PretrainRun
from nemotron3.training.evaluation import evaluate
from nemotron3.training.losses import Targets
from nemotron3.training.trainer import StepReport, Trainer

SUMMARY_FILE = "summary.json"
MODEL_FOLDER = "model"
METRICS_FILE = "metrics.jsonl"
_NUM_PROMPTS, _PROMPT_CHARACTERS = 3, 24


class Watcher:
    """Whoever watches a run; by default nobody does."""

    def stage(self, message: str) -> None:
        """A part of the run begins."""

    def progress(self, what: str, done: int, total: int) -> None:
        """A long part that is not training has come so far."""

    def trained(self, report: StepReport, run: PretrainRun) -> None:
        """An update was made."""


@dataclass(frozen=True, kw_only=True)
class PretrainSummary:
    """What a finished run has to show."""

    bits_per_byte: float
    """On all held-out text."""
    by_source: dict[str, float]
    """The same, source by source."""
    held_out_bytes: int
    """Size of that text."""
    held_out_share: float
    """Its share of the corpus, in bytes."""
    baselines: dict[str, float]
    """Bits per byte of simple models on the same text."""
    tokens: int
    """Tokens trained on."""
    seconds: float
    """Wall time of this call, from preparation to report."""
    samples: tuple[dict[str, str], ...]
    """Prompts and what the model made of them."""
    parameters: int
    """Parameters, with multi-token prediction."""
    active_parameters: int
    """Parameters that a token passes."""


def pretrain(
    run: PretrainRun,
    *,
    runs: Path = Path("runs"),
    watcher: Watcher | None = None,
    replay: Path | None = None,
) -> PretrainSummary:
    """Carry out `run` in the folder runs/NAME, from where it stands there.

    `replay` is the `run.json` that `run` was read from, if it was: other data than it tells of are
    said to the watcher.
    """
    watcher = watcher or Watcher()
    started = time.perf_counter()
    folder = runs / run.name
    device = resolve_device(run.device)
    _claim(folder, run)
    if (folder / SUMMARY_FILE).exists():
        changes = changes_since(folder, run.corpus)
        note = f" (the data changed since: {in_words(changes)})" if changes else ""
        watcher.stage(f"{folder} is finished{note}; this is what it showed")
        return read_summary(folder)

    watcher.stage("Preparing the corpus")
    corpus, inputs = open_inputs(folder, run.corpus, say=watcher.stage, progress=watcher.progress)
    if replay and (changes := replay_differences(replay, run.corpus, corpus)):
        watcher.stage(f"The data are not those of {replay} ({in_words(changes)})")
    vocabulary = corpus.tokenizer.vocab_size
    if vocabulary > run.model.vocab_size:
        raise ConfigError(
            f"the tokenizer has {vocabulary} entries and model.vocab_size is "
            f"{run.model.vocab_size}; set --model.vocab-size to at least {vocabulary}"
        )
    write_inputs(folder, inputs)
    found = {"device": describe_device(device), "corpus": to_record(corpus.manifest)}
    write_run(folder, run, extra=found)
    corpus.tokenizer.save(folder / TOKENIZER_FOLDER)

    model = _train(run, folder, corpus, device, watcher)

    watcher.stage("Writing the model")
    model.save_pretrained(folder / MODEL_FOLDER)
    corpus.tokenizer.save(folder / MODEL_FOLDER)
    summary = _look(run, corpus, model, watcher, started)
    write_run(folder, run, extra=found | {"backends": chosen_backends()})
    write_report(folder, summary=_report(run, corpus, summary, device))
    # Last, because a run with a summary is finished.
    _write_summary(folder, summary)
    return summary


def read_summary(folder: Path) -> PretrainSummary:
    """The summary of a finished run."""
    return from_record(PretrainSummary, json.loads((folder / SUMMARY_FILE).read_text("utf-8")))


def _claim(folder: Path, run: PretrainRun) -> None:
    """Refuse a folder that holds another run; its checkpoints would be continued wrongly."""
    if not (folder / "run.json").exists():
        return
    before, now = to_record(read_run(folder, PretrainRun)), to_record(run)
    changed = sorted(_differences(before, now))
    if changed:
        path, old, new = changed[0]
        raise ConfigError(
            f"{folder} holds a run with other settings ({len(changed)} differ, first {path}: "
            f"{old} there, {new} now); give this one another --name, or delete the folder"
        )


def _differences(before: Any, now: Any, path: str = "") -> Iterator[tuple[str, str, str]]:
    if isinstance(before, list) and isinstance(now, list) and len(before) == len(now):
        for index, (one, other) in enumerate(zip(before, now, strict=True)):
            yield from _differences(one, other, f"{path}[{index}]")
        return
    if isinstance(before, dict) and isinstance(now, dict):
        for key in before.keys() | now.keys():
            yield from _differences(
                before.get(key), now.get(key), f"{path}.{key}" if path else str(key)
            )
    elif before != now:
        yield path, str(before), str(now)


def _train(
    run: PretrainRun,
    folder: Path,
    corpus: Corpus,
    device: torch.device,
    watcher: Watcher,
) -> LanguageModel:
    config = run.training
    files = dict(corpus.train)
    schedule = PhaseSchedule.build(
        run.phases,
        total_samples=config.steps * config.batch_size,
        num_tokens={name: file.num_tokens for name, file in files.items()},
    )
    loader = Loader(
        files, schedule, seq_len=config.seq_len, batch_size=config.batch_size, seed=run.seed
    )
    passes = config.batch_size // config.microbatch_size

    def batches(step: int) -> list[Targets]:
        parts = (
            loader.batch(step, microbatch=part, num_microbatches=passes) for part in range(passes)
        )
        return [_targets(part, device) for part in parts]

    model = LanguageModel.from_config(run.model, seed=run.seed, device=device)
    watcher.stage(f"Training on {describe_device(device)}")
    horizon = getattr(config.schedule, "total_steps", config.steps)
    if horizon != config.steps:
        watcher.stage(
            f"The learning rate is scheduled for {horizon} steps and training ends after "
            f"{config.steps}; --training.schedule.total-steps changes the former"
        )
    trainer = Trainer(
        model,
        config,
        batches=batches,
        evaluation=lambda m: _bits(run, corpus, m, run.evaluation_rows)[0],
        store=CheckpointStore(folder / "checkpoints", retention=run.retention),
        peak_flops=measure_product_rate(device, run.training.precision.dtype, product=linear),
    )
    next_step = trainer.resume() + 1
    with MetricLog(_sinks(folder, next_step)) as log:
        trainer.fit(log, on_step=lambda report: watcher.trained(report, run))
    return model


def _sinks(folder: Path, next_step: int) -> list[MetricSink]:
    try:
        tensorboard = TensorBoardSink(folder / "tensorboard", next_step=next_step)
    except ImportError as error:
        raise DependencyMissingError(str(error)) from error
    return [JsonlSink(folder / METRICS_FILE, next_step=next_step), tensorboard]


def _targets(batch: Batch, device: torch.device) -> Targets:
    batch = batch.to(device)
    return Targets(
        tokens=batch.tokens,
        targets=batch.targets,
        mask=batch.loss_mask,
        segments=Segments(batch.lengths),
    )


def _bits(
    run: PretrainRun, corpus: Corpus, model: LanguageModel, rows: int | None
) -> tuple[dict[str, float], dict[str, float]]:
    """Held-out metrics over all sources, by their share of the held-out bytes; bits by source."""
    token_bytes = torch.tensor(corpus.tokenizer.byte_lengths(), device=model.device)
    total: dict[str, float] = {}
    by_source: dict[str, float] = {}
    all_bytes = sum(source.held_out.bytes for source in corpus.manifest.sources)
    for source in corpus.manifest.sources:
        batches = held_out_batches(
            corpus.held_out[source.name],
            name=source.name,
            seq_len=run.training.seq_len,
            batch_size=run.training.microbatch_size,
            max_rows=rows,
        )
        metrics = evaluate(model, (_targets(b, model.device) for b in batches), token_bytes)
        share = source.held_out.bytes / all_bytes
        for name, value in metrics.items():
            total[name] = total.get(name, 0.0) + share * value
        by_source[source.name] = metrics["eval/bits_per_byte"]
    return total, by_source


def _look(
    run: PretrainRun,
    corpus: Corpus,
    model: LanguageModel,
    watcher: Watcher,
    started: float,
) -> PretrainSummary:
    watcher.stage("Reading all held-out text")
    total, by_source = _bits(run, corpus, model, run.final_evaluation_rows)
    watcher.stage("Measuring simple baselines on the same text")
    held_out = [
        document.text for name in corpus.names for document in corpus.held_out_documents(name)
    ]
    train = corpus.train_sample(max_bytes=run.baselines.train_bytes)
    baselines = baseline_bits_per_byte(train, held_out, run.baselines)
    watcher.stage("Writing samples")
    costs = model_costs(run.model)
    return PretrainSummary(
        bits_per_byte=total["eval/bits_per_byte"],
        by_source=by_source,
        held_out_bytes=corpus.manifest.held_out_bytes,
        held_out_share=corpus.manifest.held_out_share,
        baselines=baselines,
        tokens=run.training.steps * run.training.tokens_per_step,
        seconds=time.perf_counter() - started,
        samples=_write_samples(run, corpus, model),
        parameters=costs.total + costs.mtp_parameters,
        active_parameters=costs.total_active,
    )


def _write_samples(
    run: PretrainRun, corpus: Corpus, model: LanguageModel
) -> tuple[dict[str, str], ...]:
    tokenizer = corpus.tokenizer
    prompts = run.prompts or _held_out_beginnings(corpus)
    stops = (*run.sampling.stop_token_ids, tokenizer.eos_id)
    sampling = replace(run.sampling, stop_token_ids=stops)
    written = model.generate([tokenizer.encode(prompt) for prompt in prompts], sampling)
    return tuple(
        {"prompt": prompt, "text": tokenizer.decode(tokens, skip_special_tokens=True)}
        for prompt, tokens in zip(prompts, written, strict=True)
    )


def _held_out_beginnings(corpus: Corpus) -> tuple[str, ...]:
    documents = (document for name in corpus.names for document in corpus.held_out_documents(name))
    return tuple(document.text[:_PROMPT_CHARACTERS] for document in islice(documents, _NUM_PROMPTS))


def _write_summary(folder: Path, summary: PretrainSummary) -> None:
    partial = folder / f"{SUMMARY_FILE}.tmp"
    partial.write_text(json.dumps(to_record(summary), indent=2) + "\n", encoding="utf-8")
    partial.replace(folder / SUMMARY_FILE)


def _report(
    run: PretrainRun, corpus: Corpus, summary: PretrainSummary, device: torch.device
) -> ReportSummary:
    sources = [
        {
            "source": source.name,
            "licence": source.licence,
            "origin": source.origin,
            "version": source.version,
            "tokens": source.train.tokens,
            "held-out bytes": source.held_out.bytes,
            "held-out share": f"{source.held_out_share:.1%}",
            "bits per byte": round(summary.by_source[source.name], 3),
            "bad rows": sum(source.bad_rows.values()),
        }
        for source in corpus.manifest.sources
    ]
    return ReportSummary(
        title=f"Pre-training: {run.name}",
        command=" ".join(["nemotron3", *sys.argv[1:]]),
        lead=(
            f"A hybrid of {run.model.num_layers} layers ({run.model.hybrid_override_pattern}) "
            f"trained on {summary.tokens:,} tokens of real text. {describe_device(device)}."
        ),
        facts={
            "parameters": f"{summary.parameters / 1e6:.1f} M",
            "active per token": f"{summary.active_parameters / 1e6:.1f} M",
            "tokens": f"{summary.tokens / 1e6:.2f} M",
            "held-out text": f"{summary.held_out_share:.1%} ({summary.held_out_bytes:,} bytes)",
            "minutes": f"{summary.seconds / 60:.1f}",
        },
        model_name=run.name,
        bits_per_byte=summary.bits_per_byte,
        baselines=summary.baselines,
        samples=[TextSample(prompt=s["prompt"], text=s["text"]) for s in summary.samples],
        sources=sources,
        config=to_record(run),
    )
