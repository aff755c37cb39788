"""/tokenize and /detokenize, with the fields of vLLM."""

from collections.abc import Mapping
from typing import Any, ClassVar

from nemotron3.server.generation.logprobs import token_text
from nemotron3.server.generation.prompts import prepare_text, render_chat
from nemotron3.server.generation.sampling import SamplingBody
from nemotron3.server.generation.serving import ServingContext
from nemotron3.server.generation.thinking import ChatTemplateKwargs, resolve_thinking
from nemotron3.server.http.bodies import Body, Unsupported
from nemotron3.server.http.errors import invalid_request


class TokenizeBody(Body):
    """A text to tokenize, or a conversation to render and tokenize."""

    unsupported: ClassVar[Mapping[str, Unsupported]] = {
        "add_special_tokens": Unsupported("a text is taken as it stands", (False,)),
    }

    model: str | None = None
    prompt: str | None = None
    messages: list[dict[str, Any]] | None = None
    tools: list[dict[str, Any]] | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: ChatTemplateKwargs | None = None
    return_token_strs: bool | None = None


class DetokenizeBody(Body):
    """Token ids to decode."""

    model: str | None = None
    tokens: list[int]


async def tokenize(serving: ServingContext, body: TokenizeBody) -> dict[str, Any]:
    """Token ids of a text or of a conversation."""
    limit = serving.llm.max_model_len
    if body.prompt is not None and body.messages is None:
        _assert_text_alone(body)
        prompt = await prepare_text(serving.llm, body.prompt)
    elif body.messages is not None and body.prompt is None:
        thinking = resolve_thinking(SamplingBody(), body.chat_template_kwargs)
        options = dict(thinking.template_options)
        for name in ("add_generation_prompt", "continue_final_message"):
            if (value := getattr(body, name)) is not None:
                options[name] = value
        prompt = await render_chat(
            serving.llm, body.messages, tools=body.tools, options=options, names=thinking.names
        )
    else:
        raise invalid_request("give either prompt or messages", "prompt")
    said: dict[str, Any] = {
        "count": len(prompt.ids),
        "max_model_len": limit,
        "tokens": list(prompt.ids),
        "token_strs": None,
    }
    if body.return_token_strs:
        said["token_strs"] = [token_text(serving.llm.tokenizer, token) for token in prompt.ids]
    return said


def detokenize(serving: ServingContext, body: DetokenizeBody) -> dict[str, Any]:
    """The text of token ids."""
    size = serving.llm.tokenizer.vocab_size
    for i, token in enumerate(body.tokens):
        if not 0 <= token < size:
            raise invalid_request(
                f"tokens[{i}] is {token}; this vocabulary has the ids 0 to {size - 1:,}",
                f"tokens[{i}]",
            )
    return {"prompt": serving.llm.tokenizer.decode(body.tokens)}


def _assert_text_alone(body: TokenizeBody) -> None:
    chat_only = (
        "tools",
        "add_generation_prompt",
        "continue_final_message",
        "chat_template_kwargs",
    )
    for name in chat_only:
        if getattr(body, name) is not None:
            raise invalid_request(f"{name} belongs to messages, and a prompt is given", name)
