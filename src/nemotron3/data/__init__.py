"""From text to batches: documents, token files, blends, and loaders without state."""

from nemotron3.data.baselines import BaselinesConfig, baseline_bits_per_byte
from nemotron3.data.corpus import (
    Corpus,
    CorpusConfig,
    LoadTokenizerConfig,
    PreparedCorpus,
    TekkenTokenizerConfig,
    TrainTokenizerConfig,
    english_and_code,
    shakespeare_and_python,
)
from nemotron3.data.documents import FilesConfig, ReadReport, read_documents
from nemotron3.data.loader import Batch, Loader, held_out_batches, held_out_starts
from nemotron3.data.manifest import Manifest
from nemotron3.data.mixture import Blend, PhaseConfig, PhaseSchedule
from nemotron3.data.preparation import prepare_corpus
from nemotron3.data.sources import PinnedConfig
from nemotron3.data.token_files import TokenFile, TokenFileWriter
from nemotron3.data.tokenized import TokenizedConfig, TokenizedSource, open_tokenized

__all__ = [
    "BaselinesConfig",
    "Batch",
    "Blend",
    "Corpus",
    "CorpusConfig",
    "FilesConfig",
    "LoadTokenizerConfig",
    "Loader",
    "Manifest",
    "PhaseConfig",
    "PhaseSchedule",
    "PinnedConfig",
    "PreparedCorpus",
    "ReadReport",
    "TekkenTokenizerConfig",
    "TokenFile",
    "TokenFileWriter",
    "TokenizedConfig",
    "TokenizedSource",
    "TrainTokenizerConfig",
    "baseline_bits_per_byte",
    "english_and_code",
    "held_out_batches",
    "held_out_starts",
    "open_tokenized",
    "prepare_corpus",
    "read_documents",
    "shakespeare_and_python",
]
