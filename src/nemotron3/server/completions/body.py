"""The body of /v1/completions: texts or token ids, which no chat template changes."""

from collections.abc import Mapping
from typing import ClassVar

from nemotron3.server.generation.sampling import SamplingBody, StreamOptions
from nemotron3.server.http.bodies import Unsupported


class CompletionBody(SamplingBody):
    """Texts or lists of token ids to continue."""

    unsupported: ClassVar[Mapping[str, Unsupported]] = {
        **SamplingBody.unsupported,
        "suffix": Unsupported("the model writes from left to right", ("",)),
        "prompt_embeds": Unsupported("give a text or token ids"),
        "return_tokens_as_token_ids": Unsupported("ask for `return_token_ids`", (False,)),
        "response_format": Unsupported("write `structured_outputs`"),
    }

    prompt: str | list[str] | list[int] | list[list[int]]
    n: int | None = None
    max_tokens: int | None = None
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    echo: bool | None = None
    stream_options: StreamOptions | None = None
    return_token_ids: bool | None = None
    return_routed_experts: bool | None = None
