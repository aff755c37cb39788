"""Executes a pre-training run: corpus, model, training, evaluation and samples.

Every part can be interrupted. The corpus is complete or absent, training resumes from its last
checkpoint, and a run with a summary is finished and only shows its result again.
"""

import json
import sys
import time
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch

from nemotron3.config import from_record, to_record, write_json
from nemotron3.data import (
    Batch,
    Corpus,
    Loader,
    PhaseSchedule,
    baseline_bits_per_byte,
    held_out_batches,
)
from nemotron3.data.fingerprint import in_words
from nemotron3.errors import ConfigError
from nemotron3.models.costs import model_costs
from nemotron3.models.nemotron_h import LanguageModel
from nemotron3.models.precision import apply_precision
from nemotron3.observe.report import ReportSummary, TextSample, write_report
from nemotron3.ops.backends import recorded_backends
from nemotron3.ops.linear import linear
from nemotron3.ops.segments import Segments
from nemotron3.recipes.initial_model import check_initial_model, initial_model
from nemotron3.recipes.inputs import changes_since, open_inputs, replay_differences, write_inputs
from nemotron3.recipes.memory import announce_memory
from nemotron3.recipes.pretrain import PretrainRun
from nemotron3.recipes.run_folder import RunCallback, RunFolder
from nemotron3.recipes.run_lock import holds_folder
from nemotron3.recipes.samples import write_samples
from nemotron3.runtime.devices import describe_device, measure_product_rate
from nemotron3.training.batch import TrainBatch
from nemotron3.training.evaluation import evaluate
from nemotron3.training.pretrain_objective import PretrainObjective
from nemotron3.training.trainer import Trainer

_BEFORE_FILE = "before.json"
_NUM_PROMPTS, _PROMPT_CHARACTERS = 3, 24


@dataclass(frozen=True, kw_only=True)
class _Before:
    """What the model that a run continues was measured at, kept for a run that is resumed."""

    bits_per_byte: float


@dataclass(frozen=True, kw_only=True)
class PretrainSummary:
    """What a finished run has to show."""

    bits_per_byte: float
    """On all held-out text."""
    bits_per_byte_before: float | None
    """The same before training, of a run that continues a model."""
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

    @property
    def compared(self) -> dict[str, float]:
        """Bits per byte of what the result stands beside: simple models, and itself before."""
        before = self.bits_per_byte_before
        return self.baselines | ({} if before is None else {"before training": before})


@holds_folder()
def pretrain(
    run: PretrainRun,
    *,
    runs: Path = Path("runs"),
    callback: RunCallback | None = None,
    replay: Path | None = None,
) -> PretrainSummary:
    """Carry out `run` in the folder runs/NAME, from where it stands there.

    `replay` is the `run.json` that `run` was read from, if it was: where the data differ from those
    that it names, the callback is told.
    """
    callback = callback or RunCallback()
    started = time.perf_counter()
    folder = RunFolder(run, runs=runs)
    if (finished := folder.summary(PretrainSummary)) is not None:
        changes = changes_since(folder.path, run.corpus)
        note = f" (the data changed since: {in_words(changes)})" if changes else ""
        callback.stage(f"{folder.path} is finished{note}; this is what it showed")
        return finished

    initial_tokenizer = check_initial_model(run)
    announce_memory(run, folder.device, callback)
    callback.stage("Preparing the corpus")
    corpus, inputs = open_inputs(
        folder.path,
        run.corpus,
        init_from=run.init_from,
        say=callback.stage,
        progress=callback.progress,
    )
    if replay and (changes := replay_differences(replay, run.corpus, corpus)):
        callback.stage(f"The data are not those of {replay} ({in_words(changes)})")
    vocabulary = corpus.tokenizer.vocab_size
    if vocabulary > run.model.vocab_size:
        raise ConfigError(
            f"the tokenizer has {vocabulary} entries and model.vocab_size is "
            f"{run.model.vocab_size}; set --model.vocab-size to at least {vocabulary}"
        )
    write_inputs(folder.path, inputs)
    found = {"corpus": to_record(corpus.manifest)}
    folder.record(found)
    # That of the corpus gives the same ids, but may have the chat template of another model.
    tokenizer = initial_tokenizer or corpus.tokenizer
    tokenizer.save(folder.tokenizer)

    with recorded_backends() as backends:
        model, before = train_model(folder, corpus, callback)
        # The result is a model like any other: few bits are of its training.
        apply_precision(model, run.training.precision.unrounded)
        callback.stage("Writing the model")
        model.save_pretrained(folder.model)
        tokenizer.save(folder.model)
        summary = _final_evaluation(run, corpus, model, before, callback, started)
    folder.record(found | {"backends": backends})
    write_report(folder.path, summary=_report(run, corpus, summary, folder.device))
    folder.finish(summary)
    return summary


def train_model(
    folder: RunFolder[PretrainRun], corpus: Corpus, callback: RunCallback
) -> tuple[LanguageModel, float | None]:
    """Train from where the folder stands; writes checkpoints and metrics, and no model.

    Returns the model, in the precision of training, and the bits per byte of the one that the run
    continues.
    """
    run, device = folder.run, folder.device
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

    def batches(step: int) -> list[TrainBatch]:
        parts = (
            loader.batch(step, microbatch=part, num_microbatches=passes) for part in range(passes)
        )
        return [_train_batch(part, device) for part in parts]

    model = initial_model(run, device)
    horizon = getattr(config.schedule, "total_steps", config.steps)
    if horizon != config.steps:
        callback.stage(
            f"The learning rate is scheduled for {horizon} steps and training ends after "
            f"{config.steps}; --training.schedule.total-steps changes the former"
        )
    trainer = Trainer(
        model,
        config,
        objective=PretrainObjective(run.loss, num_mtp_depths=run.model.pattern.num_mtp_depths),
        batches=batches,
        evaluation=lambda m: held_out_bits(run, corpus, m, run.evaluation_rows)[0],
        store=folder.checkpoints(),
        peak_flops=measure_product_rate(device, run.training.precision.dtype, product=linear),
    )
    before = _before(folder, corpus, model, callback) if run.init_from is not None else None
    callback.stage(f"Training on {describe_device(device)}")
    folder.fit(trainer, callback)
    return model, before


def _before(
    folder: RunFolder[PretrainRun], corpus: Corpus, model: LanguageModel, callback: RunCallback
) -> float:
    """Bits per byte of the initial model on all held-out text; from the record of a resumed run."""
    file = folder.path / _BEFORE_FILE
    if file.exists() and folder.checkpoints().latest() is not None:
        return from_record(_Before, json.loads(file.read_text("utf-8"))).bits_per_byte
    callback.stage("Reading all held-out text before training")
    metrics, _ = held_out_bits(folder.run, corpus, model, folder.run.final_evaluation_rows)
    before = _Before(bits_per_byte=metrics["eval/bits_per_byte"])
    write_json(file, before)
    return before.bits_per_byte


def _train_batch(batch: Batch, device: torch.device) -> TrainBatch:
    batch = batch.to(device)
    return TrainBatch(
        tokens=batch.tokens,
        targets=batch.targets,
        mask=batch.loss_mask,
        segments=Segments(batch.lengths),
    )


def held_out_bits(
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
        metrics = evaluate(model, (_train_batch(b, model.device) for b in batches), token_bytes)
        share = source.held_out.bytes / all_bytes
        for name, value in metrics.items():
            total[name] = total.get(name, 0.0) + share * value
        by_source[source.name] = metrics["eval/bits_per_byte"]
    return total, by_source


def _final_evaluation(
    run: PretrainRun,
    corpus: Corpus,
    model: LanguageModel,
    before: float | None,
    callback: RunCallback,
    started: float,
) -> PretrainSummary:
    callback.stage("Reading all held-out text")
    total, by_source = held_out_bits(run, corpus, model, run.final_evaluation_rows)
    callback.stage("Measuring simple baselines on the same text")
    held_out = [
        document.text for name in corpus.names for document in corpus.held_out_documents(name)
    ]
    train = corpus.train_sample(max_bytes=run.baselines.train_bytes)
    baselines = baseline_bits_per_byte(train, held_out, run.baselines)
    callback.stage("Writing samples")
    costs = model_costs(run.model)
    return PretrainSummary(
        bits_per_byte=total["eval/bits_per_byte"],
        bits_per_byte_before=before,
        by_source=by_source,
        held_out_bytes=corpus.manifest.held_out_bytes,
        held_out_share=corpus.manifest.held_out_share,
        baselines=baselines,
        tokens=run.training.steps * run.training.tokens_per_step,
        seconds=time.perf_counter() - started,
        samples=write_samples(
            model, corpus.tokenizer, run.prompts or _held_out_beginnings(corpus), run.sampling
        ),
        parameters=costs.total + costs.mtp_parameters,
        active_parameters=costs.total_active,
    )


def _held_out_beginnings(corpus: Corpus) -> tuple[str, ...]:
    documents = (document for name in corpus.names for document in corpus.held_out_documents(name))
    return tuple(document.text[:_PROMPT_CHARACTERS] for document in islice(documents, _NUM_PROMPTS))


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
    began = "" if run.init_from is None else f"that began as {run.init_from} and was "
    return ReportSummary(
        title=f"Pre-training: {run.name}",
        command=" ".join(["nemotron3", *sys.argv[1:]]),
        lead=(
            f"A hybrid of {run.model.num_layers} layers ({run.model.hybrid_override_pattern}) "
            f"{began}trained on {summary.tokens:,} tokens of real text. {describe_device(device)}."
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
        baselines=summary.compared,
        samples=[TextSample(prompt=s["prompt"], text=s["text"]) for s in summary.samples],
        sources=sources,
        config=to_record(run),
    )
