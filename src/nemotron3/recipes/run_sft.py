"""Executes a fine-tuning run: conversations, training, the best model, answers and a report.

The result, `model/` in the run's folder, is the model whose loss on held-out conversations was
lowest, with tokenizer, chat template and stop tokens. While training goes on it is kept in `best/`,
named by `best.json`. Training resumes from its last checkpoint.

With an adapter, `best/` and checkpoints hold the adapter alone. The result is `adapter/`, and
`model/` is the base model with it merged. Beside quantized weights `adapter/` is all: merging would
make them plain.
"""

import json
import shutil
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from nemotron3.config import from_record, to_record, write_json
from nemotron3.data.conversations import Conversation, conversation_files
from nemotron3.data.loader import Batch
from nemotron3.errors import DataError
from nemotron3.inference.config import EngineConfig
from nemotron3.inference.llm import LLM
from nemotron3.inference.output_processor import Prompt
from nemotron3.models.costs import model_costs
from nemotron3.models.lora import (
    has_quantized_base,
    load_adapter,
    merge_own_adapter,
    read_adapter,
)
from nemotron3.models.nemotron_h import LanguageModel
from nemotron3.observe.report import ReportSummary, TextSample, write_report
from nemotron3.ops.backends import recorded_backends
from nemotron3.ops.linear import linear
from nemotron3.ops.segments import Segments
from nemotron3.recipes.adapters import check_stored_weights, model_to_train
from nemotron3.recipes.chat_model import save_chat_adapter, save_chat_model
from nemotron3.recipes.input_files import check_model_directory, model_files, record_input_files
from nemotron3.recipes.memory import announce_memory
from nemotron3.recipes.run_folder import RunCallback, RunFolder
from nemotron3.recipes.run_lock import holds_folder
from nemotron3.recipes.sft import SFTRun
from nemotron3.recipes.sft_data import SFTData, prepare_sft_data
from nemotron3.runtime.devices import describe_device, measure_product_rate
from nemotron3.text import AssistantMessage
from nemotron3.training.evaluation import evaluate
from nemotron3.training.sft_objective import SFTBatch, SFTObjective
from nemotron3.training.token_objective import Normalisation
from nemotron3.training.trained_parameters import trained_text
from nemotron3.training.trainer import Trainer

_BEST_FILE, _BEST_FOLDER = "best.json", "best"


@dataclass(frozen=True, kw_only=True)
class SFTSummary:
    """What a finished run has to show."""

    loss_before: dict[str, float]
    """Held-out loss in nats per trained token before training, by source; "all" for the mean."""
    loss: dict[str, float]
    """The same of the result."""
    accuracy: float
    """How often the result's first choice is the held-out token."""
    best_step: int
    """Updates after which the held-out loss was lowest: the model there is the result."""
    conversations: dict[str, int]
    """Conversations trained on, by source."""
    too_long: dict[str, int]
    """Those that no row can hold, which were left out."""
    bad_rows: dict[str, int]
    """Rows that could not be used."""
    seconds: float
    """Wall time of this call."""
    samples: tuple[dict[str, str], ...]
    """Held-out questions, the answers they came with, and those of the model."""
    parameters: int
    """Parameters, with multi-token prediction."""


@holds_folder()
def sft(
    run: SFTRun, *, runs: Path = Path("runs"), callback: RunCallback | None = None
) -> SFTSummary:
    """Carry out `run` in the folder runs/NAME, from where it stands there."""
    callback = callback or RunCallback()
    started = time.perf_counter()
    folder = RunFolder(run, runs=runs)
    if (finished := folder.summary(SFTSummary)) is not None:
        callback.stage(f"{folder.path} is finished; this is what it showed")
        return finished

    check_model_directory(run.model)
    check_stored_weights(run.model, run.lora, run.training.precision)
    callback.stage("Reading conversations")
    data = prepare_sft_data(run)
    sources = (*run.data, *run.held_out)
    conversations = [file for source in sources for file in conversation_files(source)]
    own = [file for config in run.demonstrations for file in config.files]
    record_input_files(folder.path, [*model_files(run.model), *conversations, *own])
    announce_memory(run, folder.device, callback)
    model = model_to_train(
        run.model,
        run.lora,
        precision=run.training.precision,
        device=folder.device,
        seed=run.seed,
    )
    folder.record({})
    training = _Training(folder, run, data, model, callback)
    with recorded_backends() as backends:
        training.fit()
        best = training.result()
        callback.stage("Answering held-out questions")
        summary = _summary(run, training, best, started)
    folder.record({"backends": backends})
    write_report(folder.path, summary=_report(run, data, summary, folder.device))
    folder.finish(summary)
    return summary


@dataclass(frozen=True, kw_only=True)
class _Best:
    """The model with the lowest held-out loss so far."""

    step: int
    metrics: dict[str, float]
    before: dict[str, float]
    """Metrics before training."""


class _Training:
    """The training of one run, which keeps the best model."""

    def __init__(
        self,
        folder: RunFolder[SFTRun],
        run: SFTRun,
        data: SFTData,
        model: LanguageModel,
        callback: RunCallback,
    ) -> None:
        self.folder, self.run, self.data = folder, run, data
        self.model, self.callback = model, callback
        config = run.training
        self.loader = data.loader(
            seq_len=config.seq_len, batch_size=config.batch_size, seed=run.seed
        )
        self._step = 0  # updates made, with the one that was begun last
        self._token_bytes = torch.tensor(data.tokenizer.byte_lengths(), device=model.device)

    def fit(self) -> None:
        """Train to the end; `result` is then the best model."""
        run, config, device = self.run, self.run.training, self.folder.device
        for name, count in self.data.bad_rows.items():
            if count:
                self.callback.stage(f"{count} rows of {name} cannot be used and are left out")
        for name, count in self.loader.num_too_long.items():
            if count:
                self.callback.stage(
                    f"{count} conversations of {name} are longer than {config.seq_len} tokens and "
                    "are left out; --training.seq-len makes room for them"
                )
        trainer = Trainer(
            self.model,
            config,
            objective=SFTObjective(
                run.loss, num_mtp_depths=self.model.config.pattern.num_mtp_depths
            ),
            batches=self._batches,
            evaluation=lambda _: self._look(),
            store=self.folder.checkpoints(),
            peak_flops=measure_product_rate(device, config.precision.dtype, product=linear),
        )
        if self.best is None:
            self._keep(0, self.held_out_metrics(self.model))
        self.callback.stage(trained_text(self.model))
        self.callback.stage(f"Training on {describe_device(device)}")
        self.folder.fit(trainer, self.callback)

    @property
    def best(self) -> "_Best | None":
        """The best model so far."""
        file = self.folder.path / _BEST_FILE
        return from_record(_Best, json.loads(file.read_text("utf-8"))) if file.exists() else None

    def held_out_metrics(self, model: LanguageModel) -> dict[str, float]:
        """Loss and accuracy on held-out conversations, over all and by source."""
        config, totals, count = self.run.training, dict[str, float](), 0.0
        metrics: dict[str, float] = {}
        for name in self.data.held_out:
            batches = self.data.held_out_batches(
                name, seq_len=config.seq_len, rows=config.microbatch_size
            )
            parts = [_train_batch(batch, "token", model.device) for batch in batches]
            if not parts:
                continue
            found = evaluate(model, parts, self._token_bytes)
            targets = sum(float(part.mask.sum()) for part in parts)
            metrics[f"eval/loss/{name}"] = found["eval/loss"]
            for key in ("eval/loss", "eval/accuracy"):
                totals[key] = totals.get(key, 0.0) + targets * found[key]
            count += targets
        if not count:
            raise DataError(
                f"no held-out conversation fits into {config.seq_len} tokens; raise "
                "training.seq_len"
            )
        return {key: total / count for key, total in totals.items()} | metrics

    def _look(self) -> dict[str, float]:
        metrics = self.held_out_metrics(self.model)
        assert self.best is not None
        if metrics["eval/loss"] < self.best.metrics["eval/loss"]:
            self._keep(self._step, metrics)
        return metrics

    def _keep(self, step: int, metrics: dict[str, float]) -> None:
        """Make this the best model; the one before goes when the new one is complete."""
        folder = self.folder.path / _BEST_FOLDER / f"step-{step}"
        shutil.rmtree(folder, ignore_errors=True)
        tokenizer, template, lora = self.data.tokenizer, self.data.template, self.run.lora
        if lora is None:
            save_chat_model(self.model, tokenizer, template, folder)
        else:
            base = self.run.model
            save_chat_adapter(self.model, lora, tokenizer, template, folder, base=base)
        before = metrics if self.best is None else self.best.before
        write_json(self.folder.path / _BEST_FILE, _Best(step=step, metrics=metrics, before=before))
        for other in folder.parent.iterdir():
            if other != folder:
                shutil.rmtree(other)

    def result(self) -> LanguageModel:
        """Write the best model into the run's folder; it takes the place of the trained one.

        Beside quantized weights that is the adapter.
        """
        assert self.best is not None
        source = self.folder.path / _BEST_FOLDER / f"step-{self.best.step}"
        result = self.folder.model if self.run.lora is None else self.folder.adapter
        if source.exists():  # else it was moved before an interruption
            source.rename(result)
            source.parent.rmdir()
        if self.run.lora is None:
            self.model = LanguageModel.from_pretrained(self.folder.model, device=self.folder.device)
            return self.model
        load_adapter(self.model, read_adapter(result, self.model))
        if has_quantized_base(self.model):
            return self.model
        self.callback.stage("Merging the adapter")
        merge_own_adapter(self.model)
        save_chat_model(self.model, self.data.tokenizer, self.data.template, self.folder.model)
        return self.model

    def _batches(self, step: int) -> list[SFTBatch]:
        self._step = step + 1
        config = self.run.training
        passes = config.batch_size // config.microbatch_size
        normalisation = self.run.loss.normalisation(step / config.steps)
        return [
            _train_batch(
                self.loader.batch(step, microbatch=part, num_microbatches=passes),
                normalisation,
                self.model.device,
            )
            for part in range(passes)
        ]


def _train_batch(batch: Batch, normalisation: Normalisation, device: torch.device) -> SFTBatch:
    batch = batch.to(device)
    return SFTBatch(
        tokens=batch.tokens,
        targets=batch.targets,
        mask=batch.loss_mask,
        segments=Segments(batch.lengths),
        normalisation=normalisation,
    )


def _summary(run: SFTRun, training: _Training, best: LanguageModel, started: float) -> SFTSummary:
    kept = training.best
    assert kept is not None
    costs = model_costs(best.config)
    return SFTSummary(
        loss_before=_losses(kept.before),
        loss=_losses(kept.metrics),
        accuracy=kept.metrics["eval/accuracy"],
        best_step=kept.step,
        conversations={
            name: len(source.conversations) for name, source in training.data.train.items()
        },
        too_long=training.loader.num_too_long,
        bad_rows=dict(training.data.bad_rows),
        seconds=time.perf_counter() - started,
        samples=_answers(run, training.data, best),
        parameters=costs.total + costs.mtp_parameters,
    )


def _losses(metrics: Mapping[str, float]) -> dict[str, float]:
    prefix = "eval/loss/"
    by_source = {n.removeprefix(prefix): v for n, v in metrics.items() if n.startswith(prefix)}
    return {"all": metrics["eval/loss"]} | by_source


def _answers(run: SFTRun, data: SFTData, model: LanguageModel) -> tuple[dict[str, str], ...]:
    """What the model answers to the beginnings of held-out conversations."""
    chosen: list[Conversation] = []
    for rows in zip(*data.held_out_conversations.values(), strict=False):
        chosen += rows
    questions, expected = list[Prompt](), list[str]()
    for conversation in chosen[: run.num_samples]:
        first = next(
            i for i, m in enumerate(conversation.messages) if isinstance(m, AssistantMessage)
        )
        answer = conversation.messages[first]
        assert isinstance(answer, AssistantMessage)
        rendered = data.template.render(
            conversation.messages[:first],
            tools=conversation.tools,
            effort=conversation.effort,
            enable_thinking=answer.reasoning is not None,
        )
        questions.append(
            Prompt(
                ids=tuple(rendered.tokens(data.tokenizer).ids),
                is_chat=True,
                is_reasoning_open=rendered.is_reasoning_open,
                tools=conversation.tools,
            )
        )
        expected.append(_as_text(answer))
    if not questions:
        return ()
    longest = max(len(question.ids) for question in questions)
    llm = LLM(
        model,
        tokenizer=data.tokenizer,
        config=EngineConfig(
            max_num_seqs=len(questions),
            max_model_len=longest + run.sampling.max_tokens,
            prefix_cache_bytes=0,
        ),
    )
    outputs = llm.generate(questions, run.sampling.params())
    return tuple(
        {
            "prompt": _last_words(conversation),
            "expected": wanted,
            "text": data.tokenizer.decode(output.outputs[0].token_ids),
        }
        for conversation, wanted, output in zip(chosen, expected, outputs, strict=False)
    )


def _last_words(conversation: Conversation) -> str:
    """What is said before the first answer."""
    words = ""
    for message in conversation.messages:
        if isinstance(message, AssistantMessage):
            break
        words = message.content
    return words


def _as_text(answer: AssistantMessage) -> str:
    calls = "".join(f" {call.name}({json.dumps(call.arguments)})" for call in answer.tool_calls)
    thought = f"({answer.reasoning.strip()}) " if answer.reasoning else ""
    return f"{thought}{answer.content}{calls}".strip()


def _report(run: SFTRun, data: SFTData, summary: SFTSummary, device: torch.device) -> ReportSummary:
    return ReportSummary(
        title=f"Fine-tuning: {run.name}",
        command=" ".join(["nemotron3", *sys.argv[1:]]),
        lead=(
            f"{run.model} trained on {sum(summary.conversations.values()):,} conversations. "
            f"{describe_device(device)}."
        ),
        facts={
            "parameters": f"{summary.parameters / 1e6:.1f} M",
            "held-out loss before": f"{summary.loss_before['all']:.3f}",
            "held-out loss": f"{summary.loss['all']:.3f}",
            "held-out accuracy": f"{summary.accuracy:.1%}",
            "best step": f"{summary.best_step}",
            "minutes": f"{summary.seconds / 60:.1f}",
        },
        model_name=run.name,
        samples=[TextSample(prompt=s["prompt"] + "\n", text=s["text"]) for s in summary.samples],
        sources=[
            {
                "source": name,
                "conversations": count,
                "held out": len(data.held_out.get(name, ())),
                "too long": summary.too_long[name],
                "bad rows": summary.bad_rows[name],
                "held-out loss before": round(summary.loss_before.get(name, float("nan")), 3),
                "held-out loss": round(summary.loss.get(name, float("nan")), 3),
            }
            for name, count in summary.conversations.items()
        ],
        config=to_record(run),
    )
