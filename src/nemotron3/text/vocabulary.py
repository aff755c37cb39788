r"""The family's vocabulary layout: special tokens first, then the 256 bytes, then merges.

Every Nemotron 3 vocabulary, published or trained here, is a byte-level BPE in this order:

    0 .. s-1          special tokens: the known ones at fixed ids, the others `<SPECIAL_n>`
    s .. s+255        the bytes, in byte order: "\n" is s + 10
    s+256 .. v-1      merges, most frequent first

The published models have s = 1000 of v = 131,072. In a vocabulary of a few thousand entries that
would be a quarter, so small ones use s = 32, with the same tokens at the same ids below 32. No
other module contains the text of a special token.

Text is split before merging by the Tekken rules (`PRE_TOKENIZER_PATTERN`): a word has at most one
leading character that is not a letter (usually a space), an upper-case run starts a new piece,
every digit is a piece, and newlines end a piece. The rule for digits matters most: numbers of any
length are then spelled with ten tokens, which makes arithmetic learnable.
"""

UNK = "<unk>"
BOS = "<s>"
EOS = "</s>"
IM_START = "<|im_start|>"
IM_END = "<|im_end|>"
THINK_START = "<think>"
THINK_END = "</think>"
TOOL_CALL_START = "<tool_call>"
TOOL_CALL_END = "</tool_call>"
TOOL_RESPONSE_START = "<tool_response>"
TOOL_RESPONSE_END = "</tool_response>"

SPECIAL_TOKEN_IDS: dict[str, int] = {
    UNK: 0,
    BOS: 1,
    EOS: 2,
    IM_START: 10,
    IM_END: 11,
    THINK_START: 12,
    THINK_END: 13,
    TOOL_CALL_START: 14,
    TOOL_CALL_END: 15,
    TOOL_RESPONSE_START: 16,
    TOOL_RESPONSE_END: 17,
}
"""The ids that every vocabulary of the family shares."""

CHAT_WORDS = (
    "system",
    "user",
    "assistant",
    "function",
    "parameter",
    "<function",
    "<parameter",
    ">\n",
    "</",
)
"""Text of the chat template that occurs in every conversation, split as by the pre-tokenizer. In a
small vocabulary each piece would otherwise be several tokens."""

MIN_SPECIAL_TOKENS = max(SPECIAL_TOKEN_IDS.values()) + 1
NUM_BYTES = 256

_UPPER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]"
_LOWER = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_LEAD = r"[^\r\n\p{L}\p{N}]?"
PRE_TOKENIZER_PATTERN = "|".join(
    (
        rf"{_LEAD}{_UPPER}*{_LOWER}+",  # a word, capitalised or not
        rf"{_LEAD}{_UPPER}+{_LOWER}*",  # a run of capitals
        r"\p{N}",  # one digit
        r" ?[^\s\p{L}\p{N}]+[\r\n/]*",  # punctuation, with the line end that closes it
        r"\s*[\r\n]+",  # line ends, with the white space before them
        r"\s+(?!\S)",  # white space, except one character for the next word
        r"\s+",
    )
)
"""How text is split before merging, in the syntax of the Oniguruma engine."""


def special_tokens(count: int) -> list[str]:
    """The first `count` special tokens in the order of their ids."""
    names = {token_id: token for token, token_id in SPECIAL_TOKEN_IDS.items()}
    return [names.get(i, f"<SPECIAL_{i}>") for i in range(count)]


def byte_characters() -> list[str]:
    """The printable character that represents each byte in a byte-level vocabulary.

    Printable Latin-1 bytes represent themselves; the others have the code points from 256 on, in
    order. This is the convention of all byte-level BPE files since GPT-2.
    """
    printable = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1)}
    printable |= set(range(ord("®"), ord("ÿ") + 1))
    characters: list[str] = []
    stand_ins = iter(range(NUM_BYTES, 2 * NUM_BYTES))
    for byte in range(NUM_BYTES):
        characters.append(chr(byte if byte in printable else next(stand_ins)))
    return characters
