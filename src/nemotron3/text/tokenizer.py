"""Text to token ids and back, for published vocabularies and for our own.

`Tokenizer` wraps the Rust `tokenizers` library and adds named special ids and the directory layout
of the published checkpoints and transformers (tokenizer.json, tokenizer_config.json,
special_tokens_map.json, chat_template.jinja). It also decides two questions:

- *Is `</s>` in a text a token or four characters?* In a rendered conversation it is a token. In a
  document it is text, or any web page could end a document or open a turn. `encode(text)` reads it
  as a token, `encode(text, parse_special=False)` as text.
- *Which token ends a text?* `eos_id` (`</s>`) ends a document, `im_end_id` a turn. Generation stops
  at either: `stop_ids`. A published chat tokenizer has `<|im_end|>` as its `eos_token`; this is
  kept in `settings`, written back unchanged, and not used here.

`encode` adds no ids: neither `<s>` nor `</s>`.

    tokenizer = Tokenizer.train(documents, vocab_size=4096)
    tokenizer.decode(tokenizer.encode("To be, or not to be")) == "To be, or not to be"
    tokenizer.save("runs/tiny/checkpoint")
"""

import hashlib
import json
from collections.abc import Iterable, Sequence
from functools import cache, cached_property
from pathlib import Path
from typing import Any, cast

from tokenizers import Tokenizer as Backend

from nemotron3.errors import DataError
from nemotron3.text import bpe, vocabulary

_TOKENIZER_FILE = "tokenizer.json"
_SETTINGS_FILE = "tokenizer_config.json"
_SPECIALS_FILE = "special_tokens_map.json"
_TEMPLATE_FILE = "chat_template.jinja"
_MAX_LENGTH = 1_048_576  # the family's context length; transformers warns beyond it


class Tokenizer:
    """A byte-level BPE with the family's special tokens.

    `settings` is the content of tokenizer_config.json and `specials` that of
    special_tokens_map.json, kept whole so that a published tokenizer survives loading and saving;
    `chat_template` is the Jinja source, or None.
    """

    def __init__(
        self,
        backend: Backend,
        *,
        settings: dict[str, Any] | None = None,
        specials: dict[str, Any] | None = None,
        chat_template: str | None = None,
    ) -> None:
        self._backend = backend
        self.settings = dict(settings) if settings is not None else _default_settings()
        self.specials = dict(specials or {})
        self.chat_template = chat_template
        self._spelled: dict[int, bytes] = {}

    @classmethod
    def train(
        cls,
        documents: Iterable[str],
        *,
        vocab_size: int,
        num_special_tokens: int = 32,
        min_frequency: int = 2,
        words: Sequence[str] = (),
    ) -> "Tokenizer":
        """Learn a vocabulary from documents; the same documents give the same tokenizer.

        Each of `words` becomes one entry, such as the roles of a chat (`CHAT_WORDS`).
        """
        return cls(
            bpe.learn(
                documents,
                vocab_size=vocab_size,
                num_special_tokens=num_special_tokens,
                min_frequency=min_frequency,
                words=words,
            )
        )

    @classmethod
    def from_directory(cls, path: str | Path) -> "Tokenizer":
        """Read the tokenizer files of a model directory; raises DataError if they are invalid."""
        directory = Path(path)
        file = directory / _TOKENIZER_FILE
        if not directory.is_dir():
            raise DataError(
                f"{directory} is no directory; give the one of a model or of a tokenizer"
            )
        if (directory / "model" / _TOKENIZER_FILE).is_file() and not file.is_file():
            raise DataError(f"{directory} is a run; give the model in it: {directory / 'model'}")
        if not file.is_file():
            raise DataError(
                f"{directory} holds no {_TOKENIZER_FILE}; "
                f"give the directory of a model or of a tokenizer saved by this package"
            )
        backend = _read_backend(file)
        settings_file = directory / _SETTINGS_FILE
        settings = _read_json(settings_file) if settings_file.is_file() else None
        specials_file = directory / _SPECIALS_FILE
        specials = _read_json(specials_file) if specials_file.is_file() else None
        template_file = directory / _TEMPLATE_FILE
        template = template_file.read_text(encoding="utf-8") if template_file.is_file() else None
        if template is None and settings is not None:
            # Older checkpoints keep the template among the settings.
            named = settings.get("chat_template")
            template = named if isinstance(named, str) else None
        return cls(backend, settings=settings, specials=specials, chat_template=template)

    def save(self, path: str | Path) -> None:
        """Write the tokenizer files into a directory, in transformers' format."""
        directory = Path(path)
        directory.mkdir(parents=True, exist_ok=True)
        (directory / _TOKENIZER_FILE).write_text(self.to_json(), encoding="utf-8")
        _write_json(directory / _SETTINGS_FILE, self.settings)
        specials = dict(self.specials)
        for name in ("bos_token", "eos_token", "pad_token", "unk_token"):
            token = self.settings.get(name)
            if token and _content(token) != _content(specials.get(name)):
                specials[name] = token
        _write_json(directory / _SPECIALS_FILE, specials)
        if self.chat_template is not None:
            (directory / _TEMPLATE_FILE).write_text(self.chat_template, encoding="utf-8")

    def to_json(self) -> str:
        """The content of tokenizer.json."""
        return self._backend.to_str(pretty=True)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of tokenizer.json: tokenizers with the same fingerprint give the same ids."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()

    def encode(self, text: str, *, parse_special: bool = True) -> list[int]:
        """Token ids of a text; `parse_special=False` reads special tokens as ordinary text."""
        backend = self._backend if parse_special else self._plain_backend
        try:
            return backend.encode(text, add_special_tokens=False).ids
        except TypeError as error:
            raise DataError(f"the text {text[:40]!a} is no Unicode; give it as UTF-8") from error

    def encode_batch(self, texts: Sequence[str], *, parse_special: bool = True) -> list[list[int]]:
        """Token ids of many texts, encoded in parallel."""
        backend = self._backend if parse_special else self._plain_backend
        encodings = backend.encode_batch_fast(list(texts), add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = False) -> str:
        """The text of token ids; bytes that are not UTF-8 become the replacement character."""
        return self._backend.decode(list(ids), skip_special_tokens=skip_special_tokens)

    def token_to_id(self, token: str) -> int | None:
        """The id of a vocabulary entry, or None if there is no such entry."""
        return self._backend.token_to_id(token)

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes of an id's text: for a special token its name, beyond the vocabulary none.

        Models may have more rows than the vocabulary has entries; such an id has no text.
        """
        spelled = self._spelled.get(token_id)
        if spelled is None:
            spelled = self._spelled[token_id] = self._spell(token_id)
        return spelled

    def _spell(self, token_id: int) -> bytes:
        token = self._backend.id_to_token(token_id)
        if token is None:
            return b""
        byte_of = _byte_of_character()
        if all(character in byte_of for character in token):
            return bytes(byte_of[character] for character in token)
        return token.encode()

    @property
    def special_ids(self) -> frozenset[int]:
        """Ids of all special tokens, including unused ones."""
        return self._special_ids

    @cached_property
    def _special_ids(self) -> frozenset[int]:
        added = self._backend.get_added_tokens_decoder()
        return frozenset(token_id for token_id, token in added.items() if token.special)

    def byte_lengths(self) -> list[int]:
        """Number of bytes of each id's text; 0 for special tokens.

        Bits per byte over any set of targets is their summed negative log-likelihood in bits
        divided by their summed byte lengths.
        """
        lengths = [0] * self.vocab_size
        special = self.special_ids
        for token, token_id in self._backend.get_vocab(with_added_tokens=True).items():
            # One character of a byte-level entry stands for one byte.
            lengths[token_id] = 0 if token_id in special else len(token)
        return lengths

    @property
    def vocab_size(self) -> int:
        """Number of ids, including special tokens."""
        return self._backend.get_vocab_size(with_added_tokens=True)

    @property
    def unk_id(self) -> int:
        """Id of `<unk>`, which byte-level encoding never produces; it is used for padding."""
        return self._special_id(vocabulary.UNK)

    @property
    def pad_id(self) -> int:
        """Id for padding: 0, as in the published model configs."""
        return self._special_id(vocabulary.UNK)

    @property
    def bos_id(self) -> int:
        """Id of `<s>`."""
        return self._special_id(vocabulary.BOS)

    @property
    def eos_id(self) -> int:
        """Id of `</s>`, which ends a document."""
        return self._special_id(vocabulary.EOS)

    @property
    def im_start_id(self) -> int:
        """Id of `<|im_start|>`, which opens a turn."""
        return self._special_id(vocabulary.IM_START)

    @property
    def im_end_id(self) -> int:
        """Id of `<|im_end|>`, which ends a turn."""
        return self._special_id(vocabulary.IM_END)

    @property
    def stop_ids(self) -> tuple[int, int]:
        """Ids at which generation stops: the end of a document and the end of a turn."""
        return (self.eos_id, self.im_end_id)

    @property
    def think_start_id(self) -> int:
        """Id of `<think>`, which opens the reasoning."""
        return self._special_id(vocabulary.THINK_START)

    @property
    def think_end_id(self) -> int:
        """Id of `</think>`, which closes the reasoning."""
        return self._special_id(vocabulary.THINK_END)

    @property
    def tool_call_start_id(self) -> int:
        """Id of `<tool_call>`."""
        return self._special_id(vocabulary.TOOL_CALL_START)

    @property
    def tool_call_end_id(self) -> int:
        """Id of `</tool_call>`."""
        return self._special_id(vocabulary.TOOL_CALL_END)

    @property
    def tool_response_start_id(self) -> int:
        """Id of `<tool_response>`."""
        return self._special_id(vocabulary.TOOL_RESPONSE_START)

    @property
    def tool_response_end_id(self) -> int:
        """Id of `</tool_response>`."""
        return self._special_id(vocabulary.TOOL_RESPONSE_END)

    @cached_property
    def _plain_backend(self) -> Backend:
        # A second object instead of a flag set per call, since several threads may call.
        plain = Backend.from_str(self._backend.to_str())
        plain.encode_special_tokens = True
        return plain

    def _special_id(self, token: str) -> int:
        token_id = self._backend.token_to_id(token)
        if token_id is None:
            raise DataError(
                f"the vocabulary of {self.vocab_size} entries has no {token}: "
                f"it is not of the Nemotron 3 family; train one or load a published one"
            )
        return token_id


@cache
def _byte_of_character() -> dict[str, int]:
    return {character: byte for byte, character in enumerate(vocabulary.byte_characters())}


def _content(token: Any) -> Any:
    """The text of a special token, which may be in an object with its stripping rules."""
    return cast(dict[str, Any], token).get("content") if isinstance(token, dict) else token


def _default_settings() -> dict[str, Any]:
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": vocabulary.BOS,
        "eos_token": vocabulary.EOS,
        "unk_token": vocabulary.UNK,
        "pad_token": vocabulary.UNK,
        "add_bos_token": False,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": _MAX_LENGTH,
    }


def _read_backend(file: Path) -> Backend:
    text = json.dumps(_read_json(file))
    try:
        return Backend.from_str(text)
    except Exception as error:  # the Rust library raises no narrower type
        raise DataError(
            f"{file} is JSON but no tokenizer ({error}); fetch it again from where it came"
        ) from error


def _read_json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise DataError(f"{file} is not UTF-8 at byte {error.start}; fetch it again") from error
    except json.JSONDecodeError as error:
        raise DataError(
            f"{file} is not JSON (line {error.lineno}: {error.msg}): truncated or damaged; "
            f"fetch it again from where it came"
        ) from error
    if not isinstance(content, dict):
        raise DataError(f"{file} holds {type(content).__name__}, a JSON object was expected")
    return cast(dict[str, Any], content)


def _write_json(file: Path, content: dict[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
