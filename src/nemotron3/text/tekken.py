"""The family's 131,072-entry vocabulary, built offline from a file in the package mistral-common.

The Nemotron 3 tokenizer is Mistral's Tekken with its first thousand ids reserved for special
tokens. The package `mistral-common` (Apache-2.0) contains Tekken as a list of byte strings by rank,
so the whole vocabulary is available from a package registry, without a published checkpoint. Only
the data file is read; the package itself, with its many dependencies, is never imported.

A rank list contains the entries, a BPE file the pairs that merge. The pair of an entry results from
merging its own bytes with entries of lower rank only: at each step the adjacent pair whose joined
string has the lowest rank is merged, until two parts are left.
"""

import base64
import binascii
import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from nemotron3.errors import DataError, DependencyMissingError
from nemotron3.text import bpe
from nemotron3.text.tokenizer import Tokenizer
from nemotron3.text.vocabulary import NUM_BYTES, byte_characters

VOCAB_SIZE = 131_072
NUM_SPECIAL_TOKENS = 1000
_FILE = "tekken_240911.json"


def tekken_tokenizer(file: str | Path | None = None) -> Tokenizer:
    """Build the 131,072-entry tokenizer. It takes seconds, so save the result and load it later.

    `file` is a tekken JSON file, by default the one in the installed mistral-common.
    """
    source = Path(file) if file is not None else _bundled_file()
    pattern, entries = _read_ranks(source)
    ranks = {entry: rank for rank, entry in enumerate(entries)}
    characters = byte_characters()

    def spelled(part: bytes) -> str:
        return "".join(characters[byte] for byte in part)

    merges: list[bpe.Merge] = []
    for entry in entries[NUM_BYTES:]:
        left, right = _last_merge(entry, ranks)
        merges.append((spelled(left), spelled(right)))
    return Tokenizer(
        bpe.assemble(
            merges, num_special_tokens=NUM_SPECIAL_TOKENS, pattern=pattern, ignore_merges=True
        )
    )


def _bundled_file() -> Path:
    spec = find_spec("mistral_common")
    if spec is None or spec.origin is None:
        raise DependencyMissingError(
            "the family's vocabulary is built from a file in mistral-common, which is not "
            "installed: pip install 'nemotron3[tekken]'"
        )
    file = Path(spec.origin).parent / "data" / _FILE
    if not file.is_file():
        raise DataError(
            f"the installed mistral-common carries no {_FILE}; "
            f"install another version: pip install 'mistral-common>=1.8'"
        )
    return file


def _read_ranks(file: Path) -> tuple[str, list[bytes]]:
    try:
        content: Any = json.loads(file.read_text(encoding="utf-8"))
        pattern = str(content["config"]["pattern"])
        rows: list[dict[str, Any]] = content["vocab"][: VOCAB_SIZE - NUM_SPECIAL_TOKENS]
        entries = [base64.b64decode(row["token_bytes"], validate=True) for row in rows]
    except (OSError, ValueError, KeyError, TypeError, binascii.Error) as error:
        raise DataError(
            f"{file} is no tekken vocabulary ({error!r}); reinstall mistral-common"
        ) from error
    if len(entries) != VOCAB_SIZE - NUM_SPECIAL_TOKENS:
        raise DataError(
            f"{file} has {len(entries)} ranks, {VOCAB_SIZE - NUM_SPECIAL_TOKENS} are needed; "
            f"reinstall mistral-common"
        )
    if entries[:NUM_BYTES] != [bytes([byte]) for byte in range(NUM_BYTES)]:
        raise DataError(f"{file} does not start with the 256 bytes; reinstall mistral-common")
    return pattern, entries


def _last_merge(entry: bytes, ranks: dict[bytes, int]) -> tuple[bytes, bytes]:
    limit = ranks[entry]
    cuts = list(range(len(entry) + 1))  # the parts are entry[cuts[i]:cuts[i + 1]]
    while len(cuts) > 3:
        lowest, where = limit, 0
        for i in range(1, len(cuts) - 1):
            rank = ranks.get(entry[cuts[i - 1] : cuts[i + 1]], limit)
            if rank < lowest:
                lowest, where = rank, i
        if where == 0:
            raise DataError(
                f"entry {entry!r} of rank {limit} cannot be reached by merging lower ranks: "
                f"the vocabulary is damaged; reinstall mistral-common"
            )
        del cuts[where]
    return entry[: cuts[1]], entry[cuts[1] :]
