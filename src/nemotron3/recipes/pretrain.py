"""Pre-training recipes: from text to a model directory, metrics and a report.

A recipe is a function that returns a whole `PretrainRun`; a variation of one is
`dataclasses.replace`. `nemotron3.recipes.run_pretrain.pretrain` executes it.

    run = tiny()
    longer = replace(run, name="longer", training=replace(run.training, steps=4000))
"""

from dataclasses import dataclass, field, replace
from typing import Literal

from nemotron3.checkpoint.retention import RetentionConfig
from nemotron3.data import (
    BaselinesConfig,
    CorpusConfig,
    PhaseConfig,
    TokenizedConfig,
    TrainTokenizerConfig,
    english_and_code,
    shakespeare_and_python,
)
from nemotron3.errors import ConfigError
from nemotron3.models.config import ModelConfig
from nemotron3.models.precision import PrecisionConfig, check_precision
from nemotron3.recipes.run_config import RunConfig
from nemotron3.recipes.samples import SampleConfig
from nemotron3.text.vocabulary import CHAT_WORDS
from nemotron3.training.optimizers import AdamWConfig
from nemotron3.training.pretrain_objective import PretrainLossConfig
from nemotron3.training.schedules import WSD
from nemotron3.training.trainer import TrainingConfig


@dataclass(frozen=True, kw_only=True)
class PretrainRun(RunConfig):
    """Everything that decides what a pre-training run does."""

    kind: Literal["pretrain"] = "pretrain"
    model: ModelConfig
    """The model."""
    init_from: str | None = None
    """Directory of the model to continue, a run's or a published one; null begins with initial
    weights. `model` and the tokenizer are then those of the directory."""
    corpus: CorpusConfig | TokenizedConfig
    """The text, its split, and the tokenizer; or token files that stand already."""
    training: TrainingConfig
    """Steps, batch, optimizer, schedule."""
    loss: PretrainLossConfig = field(default_factory=PretrainLossConfig)
    """Weights of the terms of the loss."""
    phases: tuple[PhaseConfig, ...] = (PhaseConfig(),)
    """Blends of the sources, one after another; the last one ends at 1.0."""
    evaluation_rows: int = 24
    """Held-out windows of each source that are looked at during training; the end reads all."""
    final_evaluation_rows: int | None = None
    """Held-out windows of each source that are looked at in the end; null for all."""
    baselines: BaselinesConfig = field(default_factory=BaselinesConfig)
    """The simple models that the result stands beside."""
    prompts: tuple[str, ...] = ()
    """Beginnings that the finished model continues; empty takes those of held-out documents."""
    sampling: SampleConfig = field(default_factory=SampleConfig)
    """How it continues them."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.init_from is None:
            check_precision(self.model, self.training.precision)
        tokenizer = self.corpus.tokenizer
        if isinstance(tokenizer, TrainTokenizerConfig) and self.init_from is not None:
            raise ConfigError(
                f"learns a new vocabulary, and {{other}} is {self.init_from}, whose model knows "
                "another one; let it be LoadTokenizerConfig with the path of that directory",
                field="corpus.tokenizer",
                other="init_from",
            )
        if isinstance(tokenizer, TrainTokenizerConfig) and (
            tokenizer.vocab_size > self.model.vocab_size
        ):
            raise ConfigError(
                f"is {tokenizer.vocab_size}, more than {{other}} {self.model.vocab_size}; "
                "make them equal",
                field="corpus.tokenizer.vocab_size",
                other="model.vocab_size",
            )


def tiny() -> PretrainRun:
    """2.1M parameters with all parts of Super, on Shakespeare and Python: minutes on two cores."""
    steps = 1200
    return PretrainRun(
        name="tiny",
        model=ModelConfig.preset("tiny"),
        corpus=shakespeare_and_python(
            tokenizer=TrainTokenizerConfig(vocab_size=1024, words=CHAT_WORDS)
        ),
        phases=(
            PhaseConfig(weights={"shakespeare": 0.5, "sympy": 0.25, "networkx": 0.25}, until=0.8),
            PhaseConfig(weights={"shakespeare": 0.6, "sympy": 0.1, "networkx": 0.3}),
        ),
        training=TrainingConfig(
            steps=steps,
            batch_size=8,
            microbatch_size=8,
            seq_len=256,
            optimizer=AdamWConfig(lr=5e-3),
            schedule=WSD(total_steps=steps, warmup_steps=30, decay_steps=420),
        ),
        retention=RetentionConfig(keep_last=4),
        prompts=("ROMEO", "To be, or not to", "def ", "class Graph"),
    )


def tiny_books() -> PretrainRun:
    """The tiny model for an hour on 78 MB of English and code (needs apt-get and npm)."""
    run = tiny()
    steps = 6000
    return PretrainRun(
        name="tiny-books",
        model=replace(run.model, vocab_size=4096),
        corpus=english_and_code(tokenizer=TrainTokenizerConfig(vocab_size=4096)),
        training=TrainingConfig(
            steps=steps,
            batch_size=8,
            microbatch_size=8,
            seq_len=256,
            optimizer=AdamWConfig(lr=3e-3),
            schedule=WSD(total_steps=steps, warmup_steps=200, decay_steps=1500),
        ),
        evaluation_rows=12,
        final_evaluation_rows=200,
        prompts=run.prompts,
    )


def small() -> PretrainRun:
    """107M parameters in bfloat16 for one GPU, on 78 MB of English and code."""
    steps = 4000
    return PretrainRun(
        name="small",
        model=ModelConfig.preset("small"),
        corpus=english_and_code(tokenizer=TrainTokenizerConfig(vocab_size=32_768)),
        training=TrainingConfig(
            steps=steps,
            batch_size=32,
            microbatch_size=8,
            seq_len=2048,
            optimizer=AdamWConfig(lr=1e-3),
            schedule=WSD(total_steps=steps, warmup_steps=100, decay_steps=800),
            precision=PrecisionConfig(activations="bfloat16"),
        ),
        prompts=tiny().prompts,
    )
