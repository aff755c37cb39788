"""The body of /v1/responses, OpenAI's newer API: a conversation is a list of items."""

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from nemotron3.server.generation.sampling import SamplingBody, StreamOptions
from nemotron3.server.generation.thinking import ChatTemplateKwargs, Effort
from nemotron3.server.http.bodies import Body, Unsupported

Include = Literal["message.output_text.logprobs", "reasoning.encrypted_content"]
LOGPROBS: Include = "message.output_text.logprobs"


class ReasoningBody(Body):
    """The reasoning effort. Answers contain the whole reasoning, so there are no summaries."""

    unsupported: ClassVar[Mapping[str, Unsupported]] = {
        "summary": Unsupported("the reasoning itself is returned", ("auto",)),
        "generate_summary": Unsupported("the reasoning itself is returned", ("auto",)),
    }

    effort: Effort | None = None


class TextFormat(Body):
    """The format of the answer: text, any JSON object, or JSON that follows a schema."""

    type: Literal["text", "json_object", "json_schema"]
    name: str | None = None
    description: str | None = None
    schema_: dict[str, Any] | None = None
    strict: bool | None = None

    model_config = Body.model_config | {"alias_generator": lambda name: name.rstrip("_")}


class TextBody(Body):
    """Settings of the answer's text."""

    unsupported: ClassVar[Mapping[str, Unsupported]] = {
        "verbosity": Unsupported("say it in the instructions", ("medium",)),
    }

    format: TextFormat | None = None


class NamedFunctionTool(Body):
    """The one function to call."""

    type: Literal["function"]
    name: str


class ResponsesBody(SamplingBody):
    """Items to answer, alone or after a stored response.

    `include: ["reasoning.encrypted_content"]` has no effect: it asks for reasoning that the client
    can send back, and all reasoning is returned as plain text, which it can send back.
    """

    unsupported: ClassVar[Mapping[str, Unsupported]] = {
        **SamplingBody.unsupported,
        "background": Unsupported("stream instead", (False,)),
        "conversation": Unsupported("use `previous_response_id`"),
        "prompt": Unsupported("there are no stored prompts; send the text"),
        "truncation": Unsupported("shorten the input", ("disabled",)),
        "max_tool_calls": Unsupported("it counts tools of the server, and there are none"),
        "return_tokens_as_token_ids": Unsupported("ask for `return_token_ids`", (False,)),
        "context_management": Unsupported("shorten the input", ([],)),
        "service_tier": Unsupported("there is one", ("auto", "default")),
        "moderation": Unsupported("check the answer in the client"),
        "prompt_cache_options": Unsupported("prefixes are cached by themselves"),
        "prompt_cache_retention": Unsupported("prefixes are cached by themselves", ("in_memory",)),
    }

    input: str | list[dict[str, Any]]
    instructions: str | None = None
    previous_response_id: str | None = None
    store: bool | None = None
    max_output_tokens: int | None = None
    top_logprobs: int | None = None
    include: list[Include] | None = None
    reasoning: ReasoningBody | None = None
    text: TextBody | None = None
    stream_options: StreamOptions | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedFunctionTool | None = None
    parallel_tool_calls: bool | None = None
    chat_template_kwargs: ChatTemplateKwargs | None = None
    return_token_ids: bool | None = None
    return_routed_experts: bool | None = None
    required_prefix_token_ids: list[int] | None = None

    @property
    def returns_ids(self) -> bool:
        """Whether the last item of a turn has the ids of its tokens."""
        return bool(self.return_token_ids or self.return_routed_experts)
