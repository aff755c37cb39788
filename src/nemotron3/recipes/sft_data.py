"""The data of a fine-tuning run: conversations as tokens, and what is held out."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

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
from nemotron3.data.held_out_conversations import choose_held_out, content_of, without
from nemotron3.data.loader import Batch
from nemotron3.data.packed_loader import PackedLoader, PackedSource, collate
from nemotron3.data.packing import pack_best_fit
from nemotron3.recipes.chat_model import chat_template_for
from nemotron3.recipes.demonstrations import demonstrations, with_earlier_tasks
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
    usable = partial(_check, template)
    read: dict[str, list[Conversation]] = {}
    bad: dict[str, int] = {}
    for config in run.data:
        report = ConversationsReport()
        read[config.title] = list(read_conversations(config, report, check=usable))
        bad[config.title] = report.bad.total()
    for config in run.demonstrations:
        read[config.title] = demonstrations(config)
        bad[config.title] = 0
    given = {
        config.title: list(read_conversations(config, check=usable)) for config in run.held_out
    }
    with_tools = any(c.tools for rows in (*read.values(), *given.values()) for c in rows)
    check_chat_tokens(tokenizer, with_tools=with_tools)

    tokenize = partial(tokenize_conversations, template=template, tokenizer=tokenizer)

    def fits(row: Conversation) -> bool:
        return 0 < len(next(tokenize([row]))) <= run.training.seq_len

    chosen = {content_of(row) for rows in given.values() for row in rows}
    if not given:
        chosen = choose_held_out(
            read,
            fraction=run.held_out_fraction,
            most=run.max_held_out,
            seed=run.seed,
            fits=fits,
        )
    kept = dict(without(read, chosen))
    if run.follow_up_fraction:
        titles = [config.title for config in run.demonstrations]
        solved = {title: kept[title] for title in titles}
        kept |= with_earlier_tasks(solved, run.follow_up_fraction, seed=run.seed, fits=fits)
    held_out = given or {
        title: [row for row in rows if content_of(row) in chosen] for title, rows in read.items()
    }
    return SFTData(
        tokenizer=tokenizer,
        template=template,
        train={
            config.title: PackedSource(
                conversations=list(
                    tokenize(kept[config.title], control=run.reasoning, seed=run.seed)
                ),
                weight=config.weight,
            )
            for config in (*run.data, *run.demonstrations)
        },
        held_out={name: list(tokenize(rows)) for name, rows in held_out.items()},
        held_out_conversations=held_out,
        bad_rows=bad,
    )


def _check(template: ChatTemplate, row: Conversation) -> None:
    """Raise for a conversation that the template refuses."""
    template.render(row.messages, tools=row.tools, effort=row.effort, add_generation_prompt=False)
    content_of(row)
