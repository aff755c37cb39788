"""Bits per byte of held-out text, for any model and any files.

Documents are read as pre-training reads them (text, JSON lines, Parquet), each is closed by the end
token, and windows of `seq_len` tokens go through the model without what was before them. The result
does not depend on the tokenizer's vocabulary, and little on the windows.
"""

import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from nemotron3.data import (
    Batch,
    FilesConfig,
    ReadReport,
    TokenFile,
    TokenFileWriter,
    held_out_batches,
    read_documents,
)
from nemotron3.models.nemotron_h import LanguageModel
from nemotron3.ops.segments import Segments
from nemotron3.text import Tokenizer
from nemotron3.training.batch import TrainBatch
from nemotron3.training.evaluation import evaluate

_BATCH_TOKENS = 8192


@dataclass(frozen=True, kw_only=True)
class TextResult:
    """What a model makes of some text."""

    bits_per_byte: float
    loss: float
    """Cross-entropy in nats per token."""
    accuracy: float
    """How often the most probable token is the one that comes."""
    num_documents: int
    num_bytes: int
    """Of UTF-8."""
    num_tokens: int
    """End tokens included."""
    bad_rows: str
    """Rows that are no documents, in words; empty for none."""
    by_document: dict[str, float]
    """Bits per byte of each document, by the hash of its text; a long one and a short one weigh the
    same in their mean, and not above."""


def evaluate_text(
    model: LanguageModel, tokenizer: Tokenizer, files: FilesConfig, *, seq_len: int = 1024
) -> TextResult:
    """Read all documents of `files` with the model.

    Raises `DataError` where there are none, or none has a second token.
    """
    report = ReadReport()
    num_bytes: dict[str, int] = {}
    order: list[str] = []
    losses: list[torch.Tensor] = []
    with TemporaryDirectory() as folder:
        prefix = Path(folder) / "text"
        with TokenFileWriter(prefix, vocab_size=tokenizer.vocab_size) as writer:
            for document in read_documents(files, report):
                text = document.text.encode()
                order.append(hashlib.sha256(text).hexdigest()[:16])
                num_bytes[order[-1]] = len(text)
                ids = tokenizer.encode(document.text, parse_special=False)
                writer.add([*ids, tokenizer.eos_id])
        tokens = TokenFile(prefix)
        batches = held_out_batches(
            tokens, name=files.name, seq_len=seq_len, batch_size=max(1, _BATCH_TOKENS // seq_len)
        )
        token_bytes = torch.tensor(tokenizer.byte_lengths(), device=model.device)
        metrics = evaluate(
            model,
            _train_batches(batches, model.device),
            token_bytes,
            on_losses=lambda found: losses.append(found.cpu()),
        )
        num_tokens, bounds = tokens.num_tokens, tokens.document_bounds.tolist()
    # The loss at a place is that of the token after it; the last of a document predicts another.
    nats = torch.cat(losses).double()
    bits = [nats[a : b - 1].sum().item() / math.log(2) for a, b in pairwise(bounds)]
    return TextResult(
        bits_per_byte=metrics["eval/bits_per_byte"],
        loss=metrics["eval/loss"],
        accuracy=metrics["eval/accuracy"],
        num_documents=report.documents,
        num_bytes=sum(num_bytes[each] for each in order),
        num_tokens=num_tokens,
        bad_rows=report.summary(),
        by_document={each: own / num_bytes[each] for each, own in zip(order, bits, strict=True)},
    )


def _train_batches(batches: Iterator[Batch], device: torch.device) -> Iterator[TrainBatch]:
    for batch in batches:
        moved = batch.to(device)
        yield TrainBatch(
            tokens=moved.tokens,
            targets=moved.targets,
            mask=moved.loss_mask,
            segments=Segments(moved.lengths),
        )
