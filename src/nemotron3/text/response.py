"""From generated ids to the parts of an answer: reasoning, content, tool calls, piece by piece.

One `ResponseParser` per answer joins the three readers of a stream: ids to text without half
characters, reasoning from answer, calls out of the answer. Special tokens have their effect and
are not shown: `</s>` and `<|im_end|>` end the answer, the readers handle the tags.

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
    """A whole answer. `tool_calls` may end with one that is not complete: never run that."""

    reasoning: str
    content: str
    tool_calls: tuple[ParsedCall, ...]


class ResponseParser:
    """Reads one stream of generated ids.

    Tags are taken by their ids; a vocabulary that lacks one of them is read by its characters.
    Without `tools` nothing is a call. `num_reasoning_tokens` counts the ids that a model generated
    between the tags of its reasoning: no tag, no beginning of a call that ends it, and nothing that
    was forced on the model. `num_content_tokens` counts those that content is made of: no calls,
    and no white space that is dropped.
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
        self._hidden = tokenizer.special_ids - set(ids)
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
        self.num_reasoning_tokens = self.num_content_tokens = 0
        self._num_undecided = 0

    def push(self, ids: Iterable[int], *, is_forced: bool = False) -> list[ResponseDelta]:
        """Take generated ids; what they make certain comes back.

        Ids that were forced (`is_forced`) are read like any others, and not counted as reasoning.
        """
        deltas: list[ResponseDelta] = []
        for token_id in ids:
            was_open = self._splitter.is_reasoning_open
            tag = self._tags.get(token_id)
            if was_open and tag in CALL_TAGS:  # in the reasoning they are text
                tag = None
            if token_id in self._hidden:
                spans = []
            elif tag is None:
                text = self._detokenizer.push([token_id])
                spans = self._splitter.push(text)
                self.num_content_tokens += not was_open and self._is_content(text, spans)
            else:
                spans = self._splitter.push(self._detokenizer.finish())
                shown = self._splitter.push_tag(tag)
                self.num_content_tokens += any(map(self._is_shown, shown))
                spans += shown
            if was_open:
                is_nothing = tag is not None and not spans  # a tag that repeats the prompt's
                self._count_reasoning(int(not is_forced and not is_nothing), tag)
            deltas += self._read(spans)
        return deltas

    def _count_reasoning(self, one: int, tag: str | None) -> None:
        """Count what came while the reasoning was open, once it is known to be reasoning."""
        if tag is not None:  # what came before it was no beginning of a call
            self._decide()
        if not self._splitter.is_reasoning_open:  # what is undecided was a call, or a tag as text
            self._num_undecided = 0
        elif self._splitter.is_undecided:
            self._num_undecided += 1
        else:
            self._decide()
            self.num_reasoning_tokens += one

    def _decide(self) -> None:
        self.num_reasoning_tokens += self._num_undecided
        self._num_undecided = 0

    def count_unshown(self, ids: Iterable[int]) -> None:
        """Count ids at the end of the answer that are not shown: those of a stop string."""
        for token_id in ids:
            if not self._splitter.is_reasoning_open or self._tags.get(token_id) == THINK_END:
                return
            self.num_reasoning_tokens += 1

    def push_text(self, text: str) -> list[ResponseDelta]:
        """Take text that the answer ends with, inside a token.

        It begins with what the tokens before left undecided: half a character, if anything.
        """
        self._detokenizer.finish()
        is_reasoning = self._splitter.is_reasoning_open
        spans = self._splitter.push(text)
        if text and not is_reasoning:
            self.num_content_tokens += self._is_content(text, spans)
        return self._read(spans)

    def finish(self) -> list[ResponseDelta]:
        """End the stream; what was held back comes."""
        deltas = self._read(self._splitter.push(self._detokenizer.finish()))
        self._decide()
        deltas += self._read(self._splitter.finish())
        if self._calls is not None:
            deltas += self._keep(self._calls.finish())
        return deltas

    def response(self) -> Response:
        """The whole answer, once the stream is over."""
        return Response(
            reasoning="" if self._splitter.was_swapped else self._splitter.reasoning,
            content="".join(self._content),
            tool_calls=tuple(self._calls.calls) if self._calls is not None else (),
        )

    def _is_content(self, text: str, spans: Sequence[Span]) -> bool:
        """Whether a token behind the reasoning is one that content is made of."""
        is_dropped = text.isspace() and not spans
        return not is_dropped and (self._calls is None or not self._calls.is_open)

    def _is_shown(self, span: Span) -> bool:
        """Whether a special token behind the reasoning is content itself."""
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
