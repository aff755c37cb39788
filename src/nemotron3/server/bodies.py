"""What the bodies of all endpoints have in common: strict, closed, and how an answer is sampled.

OpenAI's names where it has one, vLLM's where it has none. Types are not bent ("0.5" is no number),
unknown names are refused, and names that are known elsewhere but do nothing here are refused with
what to do instead, but for values that ask for what happens anyway (`Unsupported.harmless`).
Ranges are not checked here: `SamplingParams` does, for every way in.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, cast

from pydantic import BaseModel, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError


@dataclass(frozen=True)
class Unsupported:
    """A parameter that other servers have: what to do instead, and which values ask nothing."""

    remedy: str
    harmless: tuple[Any, ...] = ()


class Body(BaseModel):
    """A JSON object that holds what its class names, and nothing else."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)
    unsupported: ClassVar[Mapping[str, Unsupported]] = {}

    @model_validator(mode="before")
    @classmethod
    def _refuse_unsupported(cls, value: Any) -> Any:
        if not isinstance(value, Mapping):
            return value
        kept: dict[Any, Any] = dict(cast(Mapping[Any, Any], value))
        for name, rule in cls.unsupported.items():
            if name not in kept:
                continue
            given = kept.pop(name)
            if given is not None and given not in rule.harmless:
                raise PydanticCustomError(
                    "unsupported", "{param} is not supported; {remedy}",
                    {"param": name, "remedy": rule.remedy},
                )  # fmt: skip
        return kept


class StreamOptions(Body):
    """What a stream tells beside the answer."""

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None
    include_obfuscation: Literal[False] | None = None


class StructuredOutputsBody(Body):
    """vLLM's `structured_outputs`: one of these."""

    # A field called `json` would hide a method of the class above.
    json_schema: dict[str, Any] | str | None = Field(default=None, alias="json")
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None
    json_object: bool | None = None

    unsupported: ClassVar[Mapping[str, Unsupported]] = {
        "structural_tag": Unsupported("write a `grammar` (Lark) instead"),
        "whitespace_pattern": Unsupported("write a `grammar` (Lark) that says where space may be"),
        "disable_any_whitespace": Unsupported("write a `grammar` (Lark)", (False,)),
        "disable_fallback": Unsupported("nothing falls back here", (False, True)),
        "disable_additional_properties": Unsupported(
            "say `additionalProperties: false` in the schema", (False,)
        ),
    }


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
    "return_tokens_as_token_ids": Unsupported("ask for `return_token_ids`", (False,)),
    **{
        f"guided_{kind}": Unsupported(f"write structured_outputs: {{{kind!r}: …}}")
        for kind in ("json", "regex", "choice", "grammar")
    },
    "guided_decoding_backend": Unsupported("there is one"),
    "guided_whitespace_pattern": Unsupported("write structured_outputs: {'grammar': …}"),
}


class SamplingBody(Body):
    """How an answer is sampled, and the metadata that every endpoint takes.

    `user`, `metadata`, `safety_identifier` and `prompt_cache_key` are notes that a client makes to
    itself; they change nothing.
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


class ChatTemplateKwargs(Body):
    """What the chat template of the family takes; the rest are other spellings of the budget."""

    unsupported: ClassVar[Mapping[str, Unsupported]] = {
        "thinking": Unsupported("say `enable_thinking`"),
        "add_generation_prompt": Unsupported("say it in the request itself"),
        "continue_final_message": Unsupported("say it in the request itself"),
    }

    enable_thinking: bool | None = None
    truncate_history_thinking: bool | None = None
    low_effort: bool | None = None
    medium_effort: bool | None = None
    reasoning_budget: int | None = None
    thinking_token_budget: int | None = None
    budget_hint: int | None = None
    force_nonempty_content: bool | None = None
