"""Sampling: the fields that all endpoints have in common, and their conversion to `SamplingParams`.

The names are OpenAI's, and vLLM's for parameters that OpenAI does not have.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, ClassVar, Literal

from nemotron3.inference.requests import SamplingParams
from nemotron3.server.generation.structured_output import StructuredOutputsBody
from nemotron3.server.http.bodies import Body, Unsupported
from nemotron3.server.http.errors import client_names, invalid_request

_SAME_NAME = (
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "seed",
    "min_tokens",
    "include_stop_str_in_output",
    "ignore_eos",
    "reasoning_grace",
)

NO_DEFAULTS: Mapping[str, Any] = MappingProxyType({})
"""The defaults of a model whose directory has none."""
NO_NAMES: Mapping[str, str] = MappingProxyType({})
"""The names of an endpoint whose fields have the names of `SamplingParams`."""

_NOT_HERE = {
    "use_beam_search": Unsupported("ask for several answers with `n`", (False,)),
    "length_penalty": Unsupported("it belongs to beam search", (1.0,)),
    "best_of": Unsupported("ask for `n` answers and choose one"),
    "bad_words": Unsupported("lower single tokens with `logit_bias`", ([],)),
    "allowed_token_ids": Unsupported("use `structured_outputs`"),
    "logits_processors": Unsupported("code is not taken over HTTP; use `structured_outputs`"),
    "truncate_prompt_tokens": Unsupported("shorten the prompt, or let /tokenize count it first"),
    "skip_special_tokens": Unsupported("ask for ids with `return_token_ids`", (True,)),
    "spaces_between_special_tokens": Unsupported("special tokens are not shown", (True, False)),
    "add_special_tokens": Unsupported("a prompt is taken as it stands", (False,)),
    "priority": Unsupported("requests are served in the order in which they come", (0,)),
    "cache_salt": Unsupported("run a second server for those who must not share a cache"),
    "kv_transfer_params": Unsupported("one engine does both, prompt and answer"),
    "vllm_xargs": Unsupported("name the parameter itself"),
    "request_id": Unsupported("send the header x-request-id"),
    **{
        f"guided_{kind}": Unsupported(f"write structured_outputs: {{{kind!r}: …}}")
        for kind in ("json", "regex", "choice", "grammar")
    },
    "guided_decoding_backend": Unsupported("there is one"),
    "guided_whitespace_pattern": Unsupported("write structured_outputs: {'grammar': …}"),
}


class SamplingBody(Body):
    """Sampling parameters, and the metadata that every endpoint accepts.

    `user`, `metadata`, `safety_identifier` and `prompt_cache_key` are for the client's own use;
    they have no effect.
    """

    unsupported: ClassVar[Mapping[str, Unsupported]] = _NOT_HERE

    model: str | None = None
    stream: bool | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    include_stop_str_in_output: bool | None = None
    ignore_eos: bool | None = None
    min_tokens: int | None = None
    structured_outputs: StructuredOutputsBody | None = None
    reasoning_budget: int | None = None
    thinking_token_budget: int | None = None
    reasoning_grace: int | None = None
    user: str | None = None
    metadata: dict[str, str] | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None


class StreamOptions(Body):
    """What a stream reports besides the answer."""

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None
    include_obfuscation: Literal[False] | None = None


def sampling_params(
    body: SamplingBody,
    defaults: Mapping[str, Any],
    *,
    names: Mapping[str, str] = NO_NAMES,
    **others: Any,
) -> SamplingParams:
    """The sampling parameters of a body; the model's `defaults` hold for fields that are not given.

    `others` are the parameters whose fields differ between endpoints, and `names` maps them to the
    fields of this endpoint, for errors.
    """
    given = {name: getattr(body, name) for name in _SAME_NAME}
    if body.stop is not None:
        given["stop"] = (body.stop,) if isinstance(body.stop, str) else tuple(body.stop)
    if body.stop_token_ids is not None:
        given["stop_token_ids"] = tuple(body.stop_token_ids)
    if body.logit_bias is not None:
        given["logit_bias"] = _logit_bias(body.logit_bias)
    given |= others
    said = {name: value for name, value in given.items() if value is not None}
    with client_names(names):
        return SamplingParams(**{**defaults, **said})


def _logit_bias(bias: Mapping[str, float]) -> dict[int, float]:
    if not all(token.isascii() and token.isdecimal() for token in bias):
        wrong = next(token for token in bias if not (token.isascii() and token.isdecimal()))
        raise invalid_request(f"logit_bias names {wrong!r}; it is a map of token ids", "logit_bias")
    return {int(token): float(value) for token, value in bias.items()}


def one_of(spellings: Mapping[str, Any]) -> tuple[str, Any]:
    """The value of a setting that has several names, and the name that the request uses.

    The given names must agree; if none is given, the result is the first name with None.
    """
    said = {name: value for name, value in spellings.items() if value is not None}
    name, value = next(iter(said.items()), (next(iter(spellings)), None))
    if any(each != value for each in said.values()):
        listed = ", ".join(f"{each} = {said[each]!r}" for each in said)
        raise invalid_request(f"{listed}: these name one setting; give one of them", name)
    return name, value
