"""The vocabulary of a GGUF file: llama.cpp has a tokenizer of its own, which reads it."""

import json
from typing import Any, cast

from tokenizers import Tokenizer as Backend

from nemotron3.errors import DataError
from nemotron3.text import Tokenizer
from nemotron3.text.vocabulary import PRE_TOKENIZER_PATTERN

_NORMAL, _CONTROL, _USER_DEFINED, _UNUSED = 1, 3, 4, 5
"""Kinds of tokens."""


def vocabulary_fields(tokenizer: Tokenizer, *, rows: int) -> dict[str, Any]:
    """The fields `tokenizer.*` of a file whose embedding has `rows` rows.

    llama.cpp knows rules for splitting text by name; `tekken` are the family's. Raises DataError
    for a tokenizer of another kind, or one that llama.cpp would read with other ids.
    """
    backend = json.loads(tokenizer.to_json())
    _check_kind(backend)
    texts = [f"[PAD{row}]" for row in range(rows)]
    kinds = [_UNUSED] * rows
    entries: dict[str, int] = backend["model"]["vocab"]
    added = {each["content"]: each for each in backend["added_tokens"]}
    for text, row in (entries | {text: each["id"] for text, each in added.items()}).items():
        if row >= rows:
            raise DataError(f"token {text!r} has id {row}, and the model has {rows:,} rows")
        texts[row] = text
        kinds[row] = _NORMAL if text not in added else _USER_DEFINED
        if text in added and added[text]["special"]:
            kinds[row] = _CONTROL
    _check_merges(tokenizer, [row for row, kind in enumerate(kinds) if kind == _NORMAL])
    fields: dict[str, Any] = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "tekken",
        "tokenizer.ggml.tokens": texts,
        "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.merges": [_merge(pair) for pair in backend["model"]["merges"]],
        "tokenizer.ggml.bos_token_id": tokenizer.bos_id,
        "tokenizer.ggml.eos_token_id": tokenizer.eos_id,
        "tokenizer.ggml.eot_token_id": tokenizer.im_end_id,
        "tokenizer.ggml.padding_token_id": tokenizer.pad_id,
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.ggml.add_eos_token": False,
        "tokenizer.ggml.add_space_prefix": False,
    }
    if tokenizer.chat_template is not None:
        fields["tokenizer.chat_template"] = tokenizer.chat_template
    return fields


def _check_kind(backend: dict[str, Any]) -> None:
    kind = backend["model"]["type"]
    splits = [
        part.get("pattern", {}).get("Regex")
        for part in (backend.get("pre_tokenizer") or {}).get("pretokenizers", ())
        if part["type"] == "Split"
    ]
    if kind != "BPE" or splits != [PRE_TOKENIZER_PATTERN] or backend.get("normalizer"):
        raise DataError(
            f"the tokenizer ({kind}) splits text by {splits or 'no rule'}; only the family's rule, "
            "'tekken' in llama.cpp, can be exported"
        )
    if not backend["model"]["merges"]:
        raise DataError("the tokenizer has no merges, and llama.cpp reads none without")


def _check_merges(tokenizer: Tokenizer, normal: list[int]) -> None:
    """Raise DataError where ids would differ: llama.cpp takes a piece that is an entry as it is,
    before it merges."""
    splitter: Any = Backend.from_str(tokenizer.to_json()).pre_tokenizer
    for row in normal:
        try:
            text = tokenizer.token_bytes(row).decode()
        except UnicodeDecodeError:
            continue  # a part of a character is no piece of a text
        ids = tokenizer.encode(text, parse_special=False)
        if ids != [row] and len(splitter.pre_tokenize_str(text)) == 1:
            raise DataError(
                f"{text!r} is token {row}, and the merges make {ids} of it; llama.cpp would read "
                "it as one token"
            )


def _merge(pair: Any) -> str:
    return pair if isinstance(pair, str) else " ".join(cast(list[str], pair))
