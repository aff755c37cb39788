"""Text and tokens: the family's vocabulary, tokenizer and chat template, and parsers of answers."""

from nemotron3.text.chat import ChatTemplate, ChatTokens, Piece, RenderedChat
from nemotron3.text.chat_style import CHAT_STYLES, ChatStyle, chat_style, style_of_template
from nemotron3.text.detokenize import IncrementalDetokenizer
from nemotron3.text.messages import (
    AssistantMessage,
    Message,
    SystemMessage,
    Tool,
    ToolCall,
    ToolMessage,
    UserMessage,
    parse_messages,
    parse_tools,
)
from nemotron3.text.reasoning import ReasoningSplitter, split_reasoning
from nemotron3.text.response import ReasoningDelta, Response, ResponseParser
from nemotron3.text.tokenizer import Tokenizer
from nemotron3.text.tool_calls import (
    CallDelta,
    ContentDelta,
    ParsedCall,
    ToolCallParser,
    parse_tool_calls,
)

__all__ = [
    "CHAT_STYLES",
    "AssistantMessage",
    "CallDelta",
    "ChatStyle",
    "ChatTemplate",
    "ChatTokens",
    "ContentDelta",
    "IncrementalDetokenizer",
    "Message",
    "ParsedCall",
    "Piece",
    "ReasoningDelta",
    "ReasoningSplitter",
    "RenderedChat",
    "Response",
    "ResponseParser",
    "SystemMessage",
    "Tokenizer",
    "Tool",
    "ToolCall",
    "ToolCallParser",
    "ToolMessage",
    "UserMessage",
    "chat_style",
    "parse_messages",
    "parse_tool_calls",
    "parse_tools",
    "split_reasoning",
    "style_of_template",
]
