"""The data of a fine-tuning run: conversations as tokens, and what is held out."""

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from nemotron3.data.chat_tokens import (
    TokenizedConversation,
    check_chat_tokens,
    tokenize_conversations,
)
from nemotron3.data.conversations import (
    Conversation,
    ConversationsReport,
    read_conversations,
)
from nemotron3.data.loader import Batch
from nemotron3.data.packed_loader import PackedLoader, PackedSource, collate
from nemotron3.data.packing import pack_best_fit
from nemotron3.errors import DataError
from nemotron3.recipes.chat_model import chat_template_for
from nemotron3.recipes.demonstrations import demonstrations
from nemotron3.recipes.sft import SFTRun
from nemotron3.text import ChatTemplate, Tokenizer


@dataclass(frozen=True, kw_only=True)
class SFTData:
    """What a run trains on and what it is judged by."""

    tokenizer: Tokenizer
    template: ChatTemplate
    train: Mapping[str, PackedSource]
    held_out: Mapping[str, Sequence[TokenizedConversation]]
    held_out_conversations: Mapping[str, Sequence[Conversation]]
    bad_rows: Mapping[str, int]
    """Rows that could not be used, by source."""

    def loader(self, *, seq_len: int, batch_size: int, seed: int) -> PackedLoader:
        """Batches of the training part."""
        return PackedLoader(self.train, seq_len=seq_len, batch_size=batch_size, seed=seed)

    def held_out_batches(self, name: str, *, seq_len: int, rows: int) -> Iterator[Batch]:
        """The held-out conversations of a source, `rows` rows at a time; too long ones are not."""
        fitting = [c for c in self.held_out[name] if 0 < len(c) <= seq_len]
        packed = pack_best_fit([len(c) for c in fitting], seq_len)
        for start in range(0, len(packed), rows):
            chosen = [index for row in packed[start : start + rows] for index in row]
            yield collate([(name, fitting[index]) for index in chosen])


def prepare_sft_data(run: SFTRun) -> SFTData:
    """Read and tokenize all conversations of a run, before any other work starts."""
    tokenizer = Tokenizer.from_directory(run.model)
    template = chat_template_for(run.chat_style, tokenizer, run.model)
    read: dict[str, list[Conversation]] = {}
    bad: dict[str, int] = {}
    for config in run.data:
        report = ConversationsReport()
        read[config.title] = list(read_conversations(config, report))
        bad[config.title] = report.bad.total()
    for config in run.demonstrations:
        read[config.title] = demonstrations(config)
        bad[config.title] = 0
    given = {config.title: list(read_conversations(config)) for config in run.held_out}
    with_tools = any(c.tools for rows in (*read.values(), *given.values()) for c in rows)
    check_chat_tokens(tokenizer, with_tools=with_tools)

    train: dict[str, PackedSource] = {}
    held_out: dict[str, list[Conversation]] = given
    for config in (*run.data, *run.demonstrations):
        kept, rest = read[config.title], list[Conversation]()
        if not run.held_out:
            kept, rest = _split(kept, config.title, run)
            held_out[config.title] = rest
        tokens = tokenize_conversations(kept, template, tokenizer, run.reasoning, seed=run.seed)
        train[config.title] = PackedSource(conversations=list(tokens), weight=config.weight)
    return SFTData(
        tokenizer=tokenizer,
        template=template,
        train=train,
        held_out={
            name: list(tokenize_conversations(rows, template, tokenizer))
            for name, rows in held_out.items()
        },
        held_out_conversations=held_out,
        bad_rows=bad,
    )


def _split(
    rows: list[Conversation], title: str, run: SFTRun
) -> tuple[list[Conversation], list[Conversation]]:
    """Training and held-out conversations; the same conversation is never in both."""
    distinct = sorted({repr((row.messages, row.tools)) for row in rows})
    if len(distinct) < 2:
        raise DataError(
            f"{title} has {len(distinct)} different conversations; training needs two or "
            "more, since one is held out"
        )
    random.Random(f"held out {run.seed} {title}").shuffle(distinct)
    count = min(run.max_held_out, max(1, round(run.held_out_fraction * len(distinct))))
    chosen = set(distinct[:count])
    is_held = [repr((row.messages, row.tools)) in chosen for row in rows]
    return (
        [row for row, held in zip(rows, is_held, strict=True) if not held],
        [row for row, held in zip(rows, is_held, strict=True) if held],
    )
