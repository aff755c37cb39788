"""The body of /v1/chat/completions.

Messages and tools are parsed by `nemotron3.text`, whose errors name the place that is wrong.
"""

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from nemotron3.server.generation.sampling import SamplingBody, StreamOptions
from nemotron3.server.generation.thinking import ChatTemplateKwargs, Effort
from nemotron3.server.http.bodies import Body, Unsupported


class JsonSchemaBody(Body):
    """The schema of an answer; it is enforced whether `strict` is set or not."""

    name: str | None = None
    description: str | None = None
    schema_: dict[str, Any] | None = None
    strict: bool | None = None

    model_config = Body.model_config | {"alias_generator": lambda name: name.rstrip("_")}


class ResponseFormat(Body):
    """The format of an answer: text, any JSON object, or JSON that follows a schema."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchemaBody | None = None


class NamedFunction(Body):
    """A function by its name."""

    name: str


class NamedTool(Body):
    """The one function to call."""

    type: Literal["function"]
    function: NamedFunction


class ChatBody(SamplingBody):
    """A conversation to answer."""

    unsupported: ClassVar[Mapping[str, Unsupported]] = {
        **SamplingBody.unsupported,
        "functions": Unsupported("it was replaced by `tools`"),
        "function_call": Unsupported("it was replaced by `tool_choice`"),
        "audio": Unsupported("these are text models"),
        "modalities": Unsupported("these are text models", (["text"],)),
        "prediction": Unsupported("drafts come from the model's own heads"),
        "web_search_options": Unsupported("offer a function for it in `tools`"),
        "verbosity": Unsupported("say it in a message", ("medium",)),
        "moderation": Unsupported("check the answer in the client"),
        "prompt_cache_options": Unsupported("prefixes are cached by themselves"),
        "prompt_cache_retention": Unsupported("prefixes are cached by themselves", ("in_memory",)),
        "service_tier": Unsupported("there is one", ("auto", "default")),
        "store": Unsupported("chat completions are not stored; /v1/responses are", (False,)),
        "echo": Unsupported("the last message is the client's own", (False,)),
        "documents": Unsupported("put them into a message"),
        "chat_template": Unsupported("the model's own is used", ()),
        "mm_processor_kwargs": Unsupported("these are text models"),
    }

    messages: list[dict[str, Any]]
    n: int | None = None
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    prompt_logprobs: int | None = None
    response_format: ResponseFormat | None = None
    stream_options: StreamOptions | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None
    reasoning_effort: Effort | None = None
    include_reasoning: bool | None = None
    chat_template_kwargs: ChatTemplateKwargs | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    return_token_ids: bool | None = None
    return_tokens_as_token_ids: bool | None = None
    return_routed_experts: bool | None = None
    required_prefix_token_ids: list[int] | None = None

    @property
    def returns_ids(self) -> bool:
        """Whether messages have the ids of their tokens; NeMo Gym asks by the second name."""
        return bool(
            self.return_token_ids or self.return_tokens_as_token_ids or self.return_routed_experts
        )
