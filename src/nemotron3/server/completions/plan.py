"""From a body of /v1/completions to prompts and sampling parameters.

`echo` puts the prompt before the answer, with its log-probabilities if `logprobs` is set. With
`max_tokens: 0` only the prompt is returned: evaluation harnesses score texts by it.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from nemotron3.inference.output_processor import Prompt
from nemotron3.inference.requests import SamplingParams
from nemotron3.server.completions.body import CompletionBody
from nemotron3.server.generation.prompts import assert_fits, prepare_text
from nemotron3.server.generation.sampling import NO_DEFAULTS, sampling_params
from nemotron3.server.generation.serving import ServingContext
from nemotron3.server.generation.structured_output import structured_output
from nemotron3.server.generation.thinking import reasoning_budget
from nemotron3.server.http.errors import invalid_request

_DEFAULT_MAX_TOKENS = 16  # OpenAI's


def plan_completion(
    body: CompletionBody, defaults: Mapping[str, Any] = NO_DEFAULTS
) -> SamplingParams:
    """The sampling parameters of a body; fields that are not given have the model's defaults."""
    if body.stream_options is not None and not body.stream:
        raise invalid_request("stream_options is for streams; send stream: true", "stream_options")
    if body.stream and (body.echo or body.prompt_logprobs is not None):
        name = "echo" if body.echo else "prompt_logprobs"
        raise invalid_request(f"{name} is not part of a stream; leave one of them out", name)
    most = _DEFAULT_MAX_TOKENS if body.max_tokens is None else body.max_tokens
    if most == 0 and not body.echo:
        raise invalid_request(
            "max_tokens is 0; ask for at least one token, or for echo", "max_tokens"
        )
    echoed = body.logprobs if body.echo else None
    budget_name, budget = reasoning_budget(body)
    return sampling_params(
        body,
        defaults,
        names={"reasoning_budget": budget_name},
        n=body.n,
        max_tokens=max(most, 1) if most >= 0 else most,
        logprobs=body.logprobs,
        prompt_logprobs=echoed if body.prompt_logprobs is None else body.prompt_logprobs,
        reasoning_budget=budget,
        structured=structured_output(body.structured_outputs),
    )


async def completion_prompts(serving: ServingContext, body: CompletionBody) -> list[Prompt]:
    """Tokenize the prompts; raises APIError for one that does not fit the context."""
    given = _prompts_of(body.prompt)
    prompts: list[Prompt] = []
    for one in given:
        if isinstance(one, str):
            prompts.append(await prepare_text(serving.llm, one))
        else:
            prompts.append(serving.llm.prepare_ids(one))
        size = len(prompts[-1].ids)
        assert_fits(size, body.max_tokens, serving.llm.max_model_len, "prompt", "max_tokens")
    return prompts


def _prompts_of(
    given: str | list[str] | list[int] | list[list[int]],
) -> Sequence[str | Sequence[int]]:
    """The prompts as a list."""
    if not given:
        raise invalid_request("prompt is empty; give a text or token ids", "prompt")
    if isinstance(given, str):
        return [given]
    ids = [token for token in given if isinstance(token, int)]
    return [ids] if ids else [one for one in given if not isinstance(one, int)]
