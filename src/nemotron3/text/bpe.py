"""Byte-level BPE in the family's layout: assembled from merges, or learned from text.

The Rust library `tokenizers` learns the merges. Its trainer orders the bytes by the characters that
represent them, so this module takes only the merges and numbers the vocabulary in the family's
order (see `vocabulary.py`). Learning is deterministic: the same text gives the same file.
"""

import json
import logging
from collections.abc import Iterable, Sequence

from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as Backend

from nemotron3.errors import ConfigError, DataError
from nemotron3.text.vocabulary import (
    MIN_SPECIAL_TOKENS,
    NUM_BYTES,
    PRE_TOKENIZER_PATTERN,
    byte_characters,
    special_tokens,
)

logger = logging.getLogger(__name__)

Merge = tuple[str, str]


def assemble(
    merges: Sequence[Merge],
    *,
    num_special_tokens: int,
    pattern: str = PRE_TOKENIZER_PATTERN,
    ignore_merges: bool = False,
) -> Backend:
    """A byte-level BPE from its merges, in order, written in byte characters.

    With `ignore_merges`, a piece that is a vocabulary entry becomes that entry without merging, as
    in rank-based vocabularies (Tekken, tiktoken).
    """
    specials = special_tokens(num_special_tokens)
    entries = [*specials, *byte_characters(), *(left + right for left, right in merges)]
    vocabulary = {entry: i for i, entry in enumerate(entries)}
    assert len(vocabulary) == len(entries), "two merges make the same entry"
    model = models.BPE(vocab=vocabulary, merges=list(merges), ignore_merges=ignore_merges)
    backend = Backend(model)
    backend.pre_tokenizer = _pre_tokenizer(pattern)
    backend.decoder = decoders.ByteLevel()
    added = [AddedToken(token, special=True, normalized=False) for token in specials]
    backend.add_special_tokens(added)  # pyright: ignore[reportUnknownMemberType]
    return backend


def learn(
    documents: Iterable[str],
    *,
    vocab_size: int,
    num_special_tokens: int,
    min_frequency: int,
    words: Sequence[str] = (),
) -> Backend:
    """Learn merges from documents until the vocabulary has `vocab_size` entries.

    Each of `words` becomes one entry, for any documents; their merges come last.
    """
    if num_special_tokens < MIN_SPECIAL_TOKENS:
        raise ConfigError(
            f"num_special_tokens = {num_special_tokens}: the family's special tokens need "
            f"{MIN_SPECIAL_TOKENS} or more (32 for a small vocabulary, 1000 as published)"
        )
    num_fixed = num_special_tokens + NUM_BYTES
    if vocab_size < num_fixed:
        raise ConfigError(
            f"vocab_size = {vocab_size} is below {num_fixed}, the special tokens and 256 bytes; "
            f"raise vocab_size or lower num_special_tokens"
        )
    learner = Backend(models.BPE())
    learner.pre_tokenizer = _pre_tokenizer(PRE_TOKENIZER_PATTERN)
    most = sum(len(word.encode()) - 1 for word in words)
    if vocab_size < num_fixed + most:
        raise ConfigError(
            f"vocab_size = {vocab_size} is below {num_fixed + most}, what special tokens, bytes "
            f"and the words {', '.join(words)} may need; raise vocab_size or give fewer words"
        )
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - num_special_tokens,
        min_frequency=min_frequency,
        initial_alphabet=byte_characters(),
        show_progress=False,
    )
    num_documents = 0

    def counted() -> Iterable[str]:
        nonlocal num_documents
        for document in documents:
            num_documents += 1
            yield document

    learner.train_from_iterator(counted(), trainer)
    if num_documents == 0:
        raise DataError("no documents to learn a vocabulary from: check the data path")
    learned: list[Merge] = [(a, b) for a, b in json.loads(learner.to_str())["model"]["merges"]]
    backend = assemble(
        _with_words(learned, words, room=vocab_size - num_fixed),
        num_special_tokens=num_special_tokens,
    )
    if backend.get_vocab_size() < vocab_size:
        logger.warning(
            "the text yields a vocabulary of %d entries, %d were asked for; "
            "more text or a lower min_frequency gives more",
            backend.get_vocab_size(),
            vocab_size,
        )
    return backend


def _with_words(learned: Sequence[Merge], words: Sequence[str], *, room: int) -> list[Merge]:
    """The first learned merges, followed by those that join each word; at most `room` merges."""
    for count in range(min(len(learned), room), -1, -1):
        merges = list(learned[:count])
        for word in words:
            merges += _joining(word, merges)
        if len(merges) <= room:
            return merges
    raise AssertionError("the words alone do not fit")


def _joining(word: str, merges: Sequence[Merge]) -> list[Merge]:
    """The merges that join the pieces of a word, after `merges`, from left to right to one entry.

    Raises ConfigError for a word that the pre-tokenizer splits.
    """
    pieces = _pre_tokenizer(PRE_TOKENIZER_PATTERN).pre_tokenize_str(word)
    if len(pieces) != 1:
        raise ConfigError(
            f"words has {word!r}, which is {len(pieces)} pieces before any merge; give a word "
            "without spaces and signs, or with one space before it"
        )
    entries = {left + right for left, right in merges} | set(byte_characters())
    tokens = [
        token.value
        for token in models.BPE(
            vocab={entry: i for i, entry in enumerate(sorted(entries))}, merges=list(merges)
        ).tokenize(pieces[0][0])
    ]
    joined, added = tokens[0], list[Merge]()
    for token in tokens[1:]:
        added.append((joined, token))
        joined += token
    return added


def _pre_tokenizer(pattern: str) -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
