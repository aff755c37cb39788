"""Text that a model is quantized with: to set scales, to train on, and to compare on.

It is that of the run that the model belongs to, its training text and its held-out text; or files,
of which every second window is for the comparison. A distillation trains on all that is not held
out.
"""

import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from nemotron3.data import (
    Batch,
    FilesConfig,
    PreparedCorpus,
    ReadReport,
    TokenFile,
    TokenFileWriter,
    held_out_batches,
    held_out_starts,
    read_documents,
)
from nemotron3.errors import DataError
from nemotron3.models.huggingface import read_config
from nemotron3.recipes.input_files import INPUTS_FILE
from nemotron3.text import Tokenizer

_SEQ_LEN = 512


@dataclass(frozen=True)
class QuantizeText:
    """Windows of tokens, and where they are from."""

    calibration: list[Batch]
    held_out: list[Batch]
    origin: str
    training: Mapping[str, TokenFile] = field(default_factory=dict)
    """Token files by source, without what is held out."""


def window_tokens(path: Path) -> int:
    """Tokens of a window for the model of a directory."""
    return min(_SEQ_LEN, read_config(path).max_position_embeddings)


@contextmanager
def open_text(path: Path, texts: Sequence[FilesConfig], num_tokens: int) -> Iterator[QuantizeText]:
    """The text for the model of a directory, at most `num_tokens` for scales and for comparison.

    Without `texts` it is that of the model's run. Tokens of files exist while the context lasts.
    """
    seq_len = window_tokens(path)
    most = max(1, num_tokens // seq_len)
    if not texts:
        yield _text_of_run(path, seq_len, most)
        return
    with TemporaryDirectory() as folder:
        tokenizer = Tokenizer.from_directory(path)
        file = _token_file(Path(folder) / "text", tokenizer, texts)
        windows = list(_windows("text", file, seq_len, 2 * most))
        if len(windows) < 2:
            raise DataError(
                f"the text has one window of {seq_len} tokens; one half is for calibration and the "
                "other for the comparison, so give more text"
            )
        starts = held_out_starts(file, seq_len=seq_len, max_rows=2 * most)[1::2]
        rest = _without(file, set(starts.tolist()), seq_len, Path(folder) / "rest", tokenizer)
        named = ", ".join(str(text.path) for text in texts)
        yield QuantizeText(
            windows[::2], windows[1::2], f"{named}: alternate windows", {"text": rest}
        )


def _text_of_run(path: Path, seq_len: int, most: int) -> QuantizeText:
    folder = _corpus_folder(path)
    if folder is None:
        none = "none: the model belongs to no run whose text is at hand; give --data"
        return QuantizeText([], [], none)
    corpus = PreparedCorpus(folder)
    share = max(1, most // len(corpus.names))
    calibration, held_out = (
        [window for name, file in files.items() for window in _windows(name, file, seq_len, share)]
        for files in (corpus.train, corpus.held_out)
    )
    origin = f"the run's own: training text, and held-out text ({folder})"
    return QuantizeText(calibration, held_out, origin, corpus.train)


def _corpus_folder(path: Path) -> Path | None:
    """The prepared text of the run that a model belongs to."""
    record = path.resolve().parent / INPUTS_FILE
    if not record.is_file():
        return None
    named = json.loads(record.read_text("utf-8")).get("corpus_folder")
    return Path(named) if named and Path(named).is_dir() else None


def _windows(name: str, file: TokenFile, seq_len: int, most: int) -> Iterator[Batch]:
    return held_out_batches(file, name=name, seq_len=seq_len, batch_size=1, max_rows=most)


def _token_file(prefix: Path, tokenizer: Tokenizer, texts: Sequence[FilesConfig]) -> TokenFile:
    with TokenFileWriter(prefix, vocab_size=tokenizer.vocab_size) as writer:
        for text in texts:
            for document in read_documents(text, ReadReport()):
                ids = tokenizer.encode(document.text, parse_special=False)
                writer.add([*ids, tokenizer.eos_id])
    return TokenFile(prefix)


def _without(
    file: TokenFile, held_out: Collection[int], seq_len: int, prefix: Path, tokenizer: Tokenizer
) -> TokenFile:
    """The tokens outside of the windows that begin at `held_out`, cut there and at documents."""
    bounds = file.document_bounds
    with TokenFileWriter(prefix, vocab_size=tokenizer.vocab_size) as writer:
        for start in range(0, file.num_tokens, seq_len):
            if start in held_out:
                continue
            window = file.tokens[start : start + seq_len]
            cuts = bounds[(bounds > start) & (bounds < start + len(window))] - start
            for piece in np.split(window, cuts):
                writer.add(piece)
    return TokenFile(prefix)
