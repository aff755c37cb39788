"""The model that a pre-training run begins with: a directory's, or one of initial weights.

A run that continues a directory's model has its architecture, its tokenizer, and all else that its
files say of it. Whatever does not fit is an error before any text is read.
"""

from dataclasses import replace
from pathlib import Path

import torch

from nemotron3.config import to_record
from nemotron3.data import (
    CorpusConfig,
    LoadTokenizerConfig,
    TekkenTokenizerConfig,
    TrainTokenizerConfig,
)
from nemotron3.errors import ConfigError
from nemotron3.models import huggingface
from nemotron3.models.config import ModelConfig
from nemotron3.models.nemotron_h import LanguageModel
from nemotron3.recipes.input_files import check_model_directory
from nemotron3.recipes.pretrain import PretrainRun
from nemotron3.recipes.run_folder import differences
from nemotron3.text import Tokenizer
from nemotron3.text.tekken import tekken_tokenizer

_NAMED = 3
_TOKENIZER_FILE = "tokenizer.json"


def continued(run: PretrainRun, directory: str) -> PretrainRun:
    """`run` beginning with the model of a directory: with its architecture and its tokenizer."""
    config = _read_config(directory, type(run.model))
    corpus = run.corpus
    if isinstance(corpus, CorpusConfig):
        corpus = replace(corpus, tokenizer=LoadTokenizerConfig(path=directory))
    name = f"{run.name}-continued"
    return replace(run, name=name, model=config, corpus=corpus, init_from=directory)


def check_initial_model(run: PretrainRun) -> Tokenizer | None:
    """Compare a run with the directory that it begins with; returns the tokenizer there, if any.

    Raises an error for a directory without a model, for another architecture, for tensors that are
    missing or cannot be trained, and for another tokenizer. No weights are read.
    """
    directory = run.init_from
    if directory is None:
        return None
    config = _read_config(directory, type(run.model))
    _check_same_model(run, directory, config)
    if (held := huggingface.stored_weight_format(directory)) is not None:
        raise ConfigError(
            f"is {directory}, whose weights are stored in {held}, which has no gradients; take the "
            "plain model",
            field="init_from",
        )
    with torch.device("meta"):
        model = LanguageModel(config)
    huggingface.prepared_weights(model, config, directory)
    if not (Path(directory) / _TOKENIZER_FILE).is_file():
        return None
    tokenizer = Tokenizer.from_directory(directory)
    if tokenizer.vocab_size > config.vocab_size:
        raise ConfigError(
            f"is {directory}, whose tokenizer has {tokenizer.vocab_size} entries and whose model "
            f"has {config.vocab_size}; one of the two is of another model",
            field="init_from",
        )
    _check_same_tokenizer(run, directory, tokenizer)
    return tokenizer


def initial_model(run: PretrainRun, device: torch.device) -> LanguageModel:
    """The model before the first step, with float32 weights."""
    if run.init_from is None:
        return LanguageModel.from_config(run.model, seed=run.seed, device=device)
    return LanguageModel.from_pretrained(
        run.init_from, device=device, dtype=torch.float32, config_class=type(run.model)
    )


def _read_config(directory: str, config_class: type[ModelConfig]) -> ModelConfig:
    check_model_directory(directory)
    return huggingface.read_config(directory, config_class)


def _check_same_model(run: PretrainRun, directory: str, config: ModelConfig) -> None:
    changed = sorted(differences(to_record(config), to_record(run.model)))
    if changed:
        named = "; ".join(f"{path} is {now}, {before} there" for path, before, now in changed[:3])
        more = f"; and {len(changed) - _NAMED} more" if len(changed) > _NAMED else ""
        raise ConfigError(
            f"is not that of the directory in {{other}}, {directory} ({named}{more}); let it be "
            "nemotron3.models.huggingface.read_config of that directory, as --init-from does",
            field="model",
            other="init_from",
        )


def _check_same_tokenizer(run: PretrainRun, directory: str, wanted: Tokenizer) -> None:
    match run.corpus.tokenizer:
        case LoadTokenizerConfig(path=path):
            found = Tokenizer.from_directory(path)
        case TekkenTokenizerConfig():
            found = tekken_tokenizer()
        case TrainTokenizerConfig():
            raise AssertionError("a run that begins with a model learns no tokenizer")
    if found.fingerprint != wanted.fingerprint:
        raise ConfigError(
            f"is not the tokenizer of {directory}, whose ids the model knows; let it be "
            f"LoadTokenizerConfig(path={directory!r})",
            field="corpus.tokenizer",
        )
