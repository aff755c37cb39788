r"""The family's chat template in Python: messages to text, to token ids, and to a loss mask.

    template = ChatTemplate(chat_style("nano"))
    prompt = template.render(parse_messages([{"role": "user", "content": "What is 2+2?"}]))
    prompt.text        # "<|im_start|>system\n<|im_end|>\n<|im_start|>user\nWhat is 2+2?…<think>\n"
    prompt.tokens(tokenizer).ids

Jinja alone is not enough: in a rendered string the template's text cannot be distinguished from a
user's. Here they are separate pieces (`Piece`), which has two consequences:

- **Text is text.** `<|im_end|>` in a user's message is ten characters, never the token that ends a
  turn. So a message cannot end its turn, open another, or close the reasoning. The published
  template is rendered to one string and encoded as a whole, which lets any message do so;
  `tokens(..., allow_special_text=True)` does that too, for comparison.
- **The mask is exact.** It trains the text that the model itself will produce: its reasoning,
  `</think>`, its answer, its calls, `<|im_end|>`. It leaves out the text of the server: every other
  turn, `<|im_start|>assistant\n`, the `<think>\n` or `<think></think>` of the generation prompt,
  and the `<think></think>` that replaces reasoning removed from the history. Text before and after
  the end of a generation prompt is encoded separately, so the ids of a prompt are a prefix of the
  ids of the finished conversation.

The text equals that of the published template, character for character, with one exception: tags
*inside* an assistant's text are text here as well. (A message that starts with a complete
`<think>…</think>` and has no reasoning field is read as reasoning and answer, because clients
without such a field send it so.) The published template instead cuts an answer that mentions
`</think>` in two, or reads it as reasoning. Roles other than the five are refused.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from nemotron3.errors import ConfigError, DataError
from nemotron3.text import tool_listing
from nemotron3.text.chat_style import CHAT_STYLES, ChatStyle
from nemotron3.text.jinja_export import jinja_source
from nemotron3.text.messages import (
    AssistantMessage,
    Message,
    SystemMessage,
    ToolMessage,
    UserMessage,
    parse_messages,
    parse_tools,
)
from nemotron3.text.tokenizer import Tokenizer
from nemotron3.text.vocabulary import (
    IM_END,
    IM_START,
    SPECIAL_TOKEN_IDS,
    THINK_END,
    THINK_START,
    TOOL_CALL_END,
    TOOL_CALL_START,
    TOOL_RESPONSE_END,
    TOOL_RESPONSE_START,
)

_TAGS = re.compile("(" + "|".join(re.escape(token) for token in SPECIAL_TOKEN_IDS) + ")")
_NO_REASONING = THINK_START + THINK_END


@dataclass(frozen=True)
class Piece:
    """A part of the rendered text, its origin, and whether the model is trained to produce it.

    Special tokens are tokens only in text from the template (`is_template`).
    """

    text: str
    is_template: bool
    is_trained: bool = False


@dataclass(frozen=True)
class ChatTokens:
    """A conversation as token ids, with a flag for each id: whether it is a training target."""

    ids: list[int]
    loss_mask: list[bool]


@dataclass(frozen=True)
class RenderedChat:
    """A rendered conversation; `is_reasoning_open`: whether it ends inside a `<think>` block."""

    pieces: tuple[Piece, ...]
    is_reasoning_open: bool

    @property
    def text(self) -> str:
        """The conversation as one string, as the published template renders it."""
        return "".join(piece.text for piece in self.pieces)

    def tokens(self, tokenizer: Tokenizer, *, allow_special_text: bool = False) -> ChatTokens:
        """Token ids and loss mask, both of the same length.

        With `allow_special_text`, special tokens in the messages' text become tokens too, as if the
        whole string were encoded: a message can then forge turns.
        """
        ids: list[int] = []
        mask: list[bool] = []
        run, is_run_trained = "", False

        def add(more: Sequence[int], *, is_trained: bool) -> None:
            ids.extend(more)
            mask.extend([is_trained] * len(more))

        def close_run() -> None:
            # Adjacent pieces are encoded together, because the vocabulary merges across them.
            nonlocal run
            add(tokenizer.encode(run, parse_special=allow_special_text), is_trained=is_run_trained)
            run = ""

        for piece in self.pieces:
            for part in _TAGS.split(piece.text) if piece.is_template else [piece.text]:
                is_tag = piece.is_template and part in SPECIAL_TOKEN_IDS
                tag_id = tokenizer.token_to_id(part) if is_tag else None
                if tag_id is not None:
                    close_run()
                    add([tag_id], is_trained=piece.is_trained)
                elif part:
                    if piece.is_trained != is_run_trained:
                        close_run()
                        is_run_trained = piece.is_trained
                    run += part
        close_run()
        return ChatTokens(ids, mask)


@dataclass(frozen=True)
class ChatTemplate:
    """The chat template of one release; see the module for its guarantees."""

    style: ChatStyle = field(default_factory=lambda: CHAT_STYLES["nano"])

    def to_jinja(self) -> str:
        """The same template as Jinja, for `chat_template.jinja` beside the weights.

        Render it with `trim_blocks` and `lstrip_blocks`, as transformers does. Its variables are
        `enable_thinking`, `truncate_history_thinking`, `tools`, `add_generation_prompt` and, if the
        style has them, `low_effort`, `medium_effort`, `reasoning_budget`.
        """
        return jinja_source(self.style)

    def render(
        self,
        messages: Sequence[Any],
        *,
        tools: Sequence[Any] | None = None,
        enable_thinking: bool = True,
        truncate_history_thinking: bool = True,
        effort: str | None = None,
        budget_hint: int | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
    ) -> RenderedChat:
        """Render messages and tools, typed or as OpenAI's dictionaries.

        `enable_thinking` affects only the generation prompt: an open `<think>` or a closed one.
        `truncate_history_thinking` leaves out the reasoning before the last user message; that of
        later calls is kept. `effort` and `budget_hint` (in tokens) add the style's hint to the last
        user message. `continue_final_message` leaves the last assistant message open, so that
        generation continues it; no generation prompt is added then.

        Raises `DataError` for an invalid message, naming its place.
        """
        said = parse_messages(messages)
        known = parse_tools(tools)
        listed = known if self.style.lists_tools else ()
        hint = self.style.hint(effort=effort, budget=budget_hint)
        first = said[0].content if said and isinstance(said[0], SystemMessage) else ""
        turns = said[1:] if said and isinstance(said[0], SystemMessage) else said
        last_user = max(
            (i for i, turn in enumerate(turns) if isinstance(turn, UserMessage)), default=-1
        )
        if hint and last_user < 0:
            raise DataError(
                "is asked for, and there is no user message that can carry it; add one",
                field="budget_hint" if effort is None else "effort",
            )
        if continue_final_message:
            _assert_can_continue(turns)

        pieces = _Pieces()
        pieces.template(f"{IM_START}system\n").text(first)
        if listed:
            pieces.template(("\n\n" if first else "") + tool_listing.HEADING)
            pieces.text("".join(tool_listing.describe_tool(tool) for tool in listed))
            pieces.template(tool_listing.INSTRUCTIONS)
        pieces.template(f"{IM_END}\n")
        is_open = False
        for i, turn in enumerate(turns):
            if isinstance(turn, AssistantMessage):
                continues = continue_final_message and i == len(turns) - 1
                is_history = truncate_history_thinking and i < last_user
                is_open = self._assistant(pieces, turn, is_history=is_history, continues=continues)
            elif isinstance(turn, ToolMessage):
                following = turns[i + 1] if i + 1 < len(turns) else None
                _tool_response(
                    pieces,
                    turn,
                    is_first=not isinstance(turns[i - 1], ToolMessage),
                    is_last=not isinstance(following, ToolMessage),
                )
            else:
                role = "user" if isinstance(turn, UserMessage) else "system"
                pieces.template(f"{IM_START}{role}\n").text(turn.content)
                pieces.template(hint if i == last_user else "").template(f"{IM_END}\n")
        if add_generation_prompt and not continue_final_message:
            pieces.template(f"{IM_START}assistant\n")
            pieces.template(f"{THINK_START}\n" if enable_thinking else _NO_REASONING)
            is_open = enable_thinking
        return RenderedChat(tuple(pieces.written), is_open)

    def continuation(
        self,
        messages: Sequence[Any],
        tokenizer: Tokenizer,
        *,
        after_token: int,
        **options: Any,
    ) -> RenderedChat:
        """What follows a turn of the assistant that is there as ids: its end, then `messages`.

        `after_token` is the last id of that turn. One that did not end by itself (at a limit of
        tokens, or behind a call) is ended as the template would. `options` are those of `render`;
        what precedes stays as it is, reasoning included.
        """
        given: dict[str, Any] = {**options, "truncate_history_thinking": False}
        head = (UserMessage(content=""), AssistantMessage(content="."))
        rendered = self.render([*head, *messages], **given)
        end = next(
            i
            for i, piece in enumerate(rendered.pieces)
            if piece.is_trained and piece.text == IM_END
        )
        if after_token == tokenizer.im_end_id:
            rest = rendered.pieces[end + 1 :]
        elif after_token == tokenizer.token_to_id(TOOL_CALL_END):
            rest = (Piece("\n", is_template=True), *rendered.pieces[end:])
        else:
            rest = rendered.pieces[end:]
        return RenderedChat(rest, rendered.is_reasoning_open)

    def _assistant(
        self,
        pieces: "_Pieces",
        message: AssistantMessage,
        *,
        is_history: bool,
        continues: bool,
    ) -> bool:
        """Write one turn of the assistant; returns whether its reasoning was left open."""
        trained = message.is_trained
        pieces.template(f"{IM_START}assistant\n")
        reasoning, glue, answer = self._reasoning_and_answer(message)
        if reasoning is None or is_history:
            pieces.template(_NO_REASONING)
        else:
            start, inside, before_end = reasoning
            pieces.template(start).text(inside, is_trained=trained)
            if continues and not answer:
                return True
            pieces.template(before_end, is_trained=trained)
            pieces.template(THINK_END, is_trained=trained and not message.is_reasoning_cut)
        if message.tool_calls and is_history:
            # Only here does the template depend on white space before an answer.
            glue, answer = "", answer.strip() if self.style.strips_content_before_calls else answer
        elif not continues:
            glue, answer = (glue, answer.rstrip()) if answer.strip() else ("", "")
        pieces.template(glue, is_trained=trained and not is_history)
        pieces.text(answer, is_trained=trained)
        if continues:
            return False
        if message.tool_calls:
            pieces.template("\n", is_trained=trained)
        for call in message.tool_calls:
            pieces.template(TOOL_CALL_START, is_trained=trained)
            pieces.text(tool_listing.write_call(call), is_trained=trained)
            pieces.template(f"{TOOL_CALL_END}\n", is_trained=trained)
        pieces.template(IM_END, is_trained=trained).template("\n")
        return False

    def _reasoning_and_answer(
        self, message: AssistantMessage
    ) -> tuple[tuple[str, str, str] | None, str, str]:
        """The reasoning (opening tag, text, end), the text after it, and the answer."""
        before_end, glue = self.style.reasoning_end.split(THINK_END)
        if message.reasoning is not None and message.reasoning.strip():
            return (f"{THINK_START}\n", message.reasoning, before_end), glue, message.content
        inside, end, answer = message.content.lstrip().partition(THINK_END)
        if end and inside.startswith(THINK_START):
            inside = inside.removeprefix(THINK_START)
            start = THINK_START + ("\n" if inside.startswith("\n") else "")
            return (start, inside.removeprefix("\n"), ""), "", answer
        return None, "", message.content


class _Pieces:
    """Collects pieces from the template (`template`) and from messages (`text`)."""

    def __init__(self) -> None:
        self.written: list[Piece] = []

    def template(self, text: str, *, is_trained: bool = False) -> "_Pieces":
        return self._add(Piece(text, is_template=True, is_trained=is_trained))

    def text(self, text: str, *, is_trained: bool = False) -> "_Pieces":
        return self._add(Piece(text, is_template=False, is_trained=is_trained))

    def _add(self, piece: Piece) -> "_Pieces":
        if piece.text:
            self.written.append(piece)
        return self


def _tool_response(pieces: _Pieces, message: ToolMessage, *, is_first: bool, is_last: bool) -> None:
    """Write a tool's answer; consecutive answers share one turn."""
    if is_first:
        pieces.template(f"{IM_START}user\n")
    pieces.template(f"{TOOL_RESPONSE_START}\n").text(message.content)
    pieces.template(f"\n{TOOL_RESPONSE_END}\n")
    if is_last:
        pieces.template(f"{IM_END}\n")


def _assert_can_continue(turns: Sequence[Message]) -> None:
    last = turns[-1] if turns else None
    if not isinstance(last, AssistantMessage) or last.tool_calls:
        raise ConfigError(
            ": the last message must be the assistant's and call no tool; "
            "leave the option out to start a turn",
            field="continue_final_message",
        )
