"""Streaming parser from generated ids to the parts of an answer: reasoning, content, tool calls.

One `ResponseParser` per answer combines three steps: it decodes ids to text, separates reasoning
from answer, and parses calls out of the answer. Special tokens have their effect and are not part
of the text: `</s>` and `<|im_end|>` end the answer, and the tags separate its parts.

    parser = ResponseParser(tokenizer, is_reasoning_open=prompt.is_reasoning_open, tools=tools)
    for ids in stream:
        for delta in parser.push(ids): ...
    parser.finish()
    parser.response(), parser.num_reasoning_tokens
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from nemotron3.text.detokenize import IncrementalDetokenizer
from nemotron3.text.messages import Tool
from nemotron3.text.reasoning import CALL_TAGS, TAGS, ReasoningSplitter, Span
from nemotron3.text.tokenizer import Tokenizer
from nemotron3.text.tool_calls import CallDelta, ContentDelta, ParsedCall, ToolCallParser
from nemotron3.text.vocabulary import THINK_END


@dataclass(frozen=True)
class ReasoningDelta:
    """A part of the reasoning."""

    text: str


ResponseDelta = ReasoningDelta | ContentDelta | CallDelta


@dataclass(frozen=True, kw_only=True)
class Response:
    """A complete answer. The last of `tool_calls` may be incomplete; it must not be executed."""

    reasoning: str
    content: str
    tool_calls: tuple[ParsedCall, ...]


class ResponseParser:
    """Parses one stream of generated ids.

    Tags are recognised by their ids; if the vocabulary lacks one of them, by their characters.
    Without `tools` there are no calls. `num_reasoning_tokens` counts the ids that the model
    generated between the tags of its reasoning, without the tags, the start of a call that ends it,
    and forced ids. `content_places` has the places, among all ids of the answer, of those of the
    content, without calls and without white space that is dropped.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        is_reasoning_open: bool,
        tools: Sequence[Tool] = (),
        keep_whitespace: bool = False,
        force_nonempty_content: bool = False,
    ) -> None:
        ids = {tokenizer.token_to_id(tag): tag for tag in TAGS}
        in_text = None in ids
        ids |= {tokenizer.token_to_id(tag): tag for tag in CALL_TAGS}
        self._tags: dict[int | None, str] = {} if in_text else ids
        self._special = tokenizer.special_ids
        self._shown = ids.keys()
        self._detokenizer = IncrementalDetokenizer(tokenizer)
        self._splitter = ReasoningSplitter(
            is_open=is_reasoning_open,
            tags_in_text=in_text,
            has_tools=bool(tools),
            keep_whitespace=keep_whitespace,
            force_nonempty_content=force_nonempty_content,
        )
        self._calls = ToolCallParser(tools, tags_in_text=in_text) if tools else None
        self._content: list[str] = []
        self.num_ids = 0
        """Ids so far."""
        self.num_reasoning_tokens = 0
        self.content_places: list[int] = []
        self._num_undecided = 0

    def push(self, ids: Iterable[int], *, is_forced: bool = False) -> list[ResponseDelta]:
        """Add generated ids; returns the parts that are certain.

        Forced ids (`is_forced`) are parsed like others, but not counted as reasoning. Ids may come
        one by one or many at once; only the number of parts differs.
        """
        deltas: list[ResponseDelta] = []
        ids, start = list(ids), 0
        while start < len(ids):
            token_id = ids[start]
            end = start + 1
            if self._is_text(token_id) and self._is_steady:
                while end < len(ids) and self._is_text(ids[end]):
                    end += 1
                deltas += self._push_text_ids(ids[start:end], is_forced=is_forced)
            else:
                deltas += self._push_one(token_id, is_forced=is_forced)
            start = end
        return deltas

    def _is_text(self, token_id: int) -> bool:
        return token_id not in self._special and token_id not in self._tags

    @property
    def _is_steady(self) -> bool:
        """Whether the ids up to the next special one are all counted as the same."""
        has_open_call = self._calls is not None and self._calls.is_open
        return self._splitter.is_steady and not has_open_call

    def _push_text_ids(self, ids: Sequence[int], *, is_forced: bool) -> list[ResponseDelta]:
        """Add ids of text, of which all are reasoning or all are content."""
        spans = self._splitter.push(self._detokenizer.push(ids))
        if self._splitter.is_reasoning_open:
            self._count_reasoning(0 if is_forced else len(ids), None)
        else:
            self.content_places += range(self.num_ids, self.num_ids + len(ids))
        self.num_ids += len(ids)
        return self._read(spans)

    def _push_one(self, token_id: int, *, is_forced: bool) -> list[ResponseDelta]:
        was_open, is_content = self._splitter.is_reasoning_open, False
        tag = self._tags.get(token_id)
        if was_open and tag in CALL_TAGS:  # they are text inside the reasoning
            tag = None
        if token_id in self._special and token_id not in self._shown:
            spans = []
        elif tag is None:
            text = self._detokenizer.push([token_id])
            spans = self._splitter.push(text)
            is_content = not was_open and self._is_content(text, spans)
        else:
            spans = self._splitter.push(self._detokenizer.finish())
            shown = self._splitter.push_tag(tag)
            is_content = any(map(self._is_shown, shown))
            spans += shown
        if is_content:
            self.content_places.append(self.num_ids)
        if was_open:
            is_nothing = tag is not None and not spans  # a tag that repeats the prompt's
            self._count_reasoning(int(not is_forced and not is_nothing), tag)
        self.num_ids += 1
        return self._read(spans)

    def _count_reasoning(self, count: int, tag: str | None) -> None:
        """Count tokens while the reasoning is open, once they are known to be part of it."""
        if tag is not None:  # the tokens before it were not the start of a call
            self._decide()
        if not self._splitter.is_reasoning_open:  # the undecided tokens were a call or a tag
            self._num_undecided = 0
        elif self._splitter.is_undecided:
            self._num_undecided += 1
        else:
            self._decide()
            self.num_reasoning_tokens += count

    def _decide(self) -> None:
        self.num_reasoning_tokens += self._num_undecided
        self._num_undecided = 0

    def count_unshown(self, ids: Iterable[int]) -> None:
        """Count ids at the end of the answer that are not in its text: those of a stop string."""
        for token_id in ids:
            if not self._splitter.is_reasoning_open or self._tags.get(token_id) == THINK_END:
                return
            self.num_reasoning_tokens += 1

    def push_text(self, text: str) -> list[ResponseDelta]:
        """Add the last text of an answer that ends inside a token.

        It includes the bytes that the tokens before left undecoded, an incomplete character.
        """
        self._detokenizer.finish()
        is_reasoning = self._splitter.is_reasoning_open
        spans = self._splitter.push(text)
        if text and not is_reasoning and self._is_content(text, spans):
            self.content_places.append(self.num_ids)
        return self._read(spans)

    def finish(self) -> list[ResponseDelta]:
        """End the stream; returns the buffered parts."""
        deltas = self._read(self._splitter.push(self._detokenizer.finish()))
        self._decide()
        deltas += self._read(self._splitter.finish())
        if self._calls is not None:
            deltas += self._keep(self._calls.finish())
        return deltas

    def response(self) -> Response:
        """The complete answer, after the end of the stream."""
        return Response(
            reasoning="" if self._splitter.was_swapped else self._splitter.reasoning,
            content="".join(self._content),
            tool_calls=tuple(self._calls.calls) if self._calls is not None else (),
        )

    def _is_content(self, text: str, spans: Sequence[Span]) -> bool:
        """Whether a token after the reasoning is part of the content."""
        is_dropped = text.isspace() and not spans
        return not is_dropped and (self._calls is None or not self._calls.is_open)

    def _is_shown(self, span: Span) -> bool:
        """Whether a special token after the reasoning is itself part of the content."""
        is_of_call = span.is_tag and (
            span.text not in CALL_TAGS or (self._calls is not None and self._calls.is_open)
        )
        return not span.is_reasoning and not is_of_call

    def _read(self, spans: Iterable[Span]) -> list[ResponseDelta]:
        deltas: list[ResponseDelta] = []
        for span in spans:
            if span.is_reasoning:
                deltas.append(ReasoningDelta(span.text))
            elif self._calls is None:
                deltas += self._keep([ContentDelta(span.text)])
            elif span.is_tag and self._tags:
                deltas += self._keep(self._calls.push_tag(span.text))
            else:
                deltas += self._keep(self._calls.push(span.text))
        return deltas

    def _keep(self, deltas: Sequence[ContentDelta | CallDelta]) -> Sequence[ResponseDelta]:
        self._content += [delta.text for delta in deltas if isinstance(delta, ContentDelta)]
        return deltas
