"""From a body's fields to `SamplingParams`, and what several spellings of one thing come to.

A budget of reasoning has three names: `reasoning_budget` (NVIDIA's), `thinking_token_budget`
(vLLM's), and the first inside `chat_template_kwargs`. They are one setting; two that differ are an
error, because whichever won, somebody would not get what they wrote.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

from nemotron3.inference.requests import GrammarKind, SamplingParams, StructuredOutput
from nemotron3.server.bodies import ChatTemplateKwargs, SamplingBody, StructuredOutputsBody
from nemotron3.server.errors import invalid_request, rename_params

_BUDGET = "reasoning_budget"
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
"""Of a model whose directory has none."""
NO_NAMES: Mapping[str, str] = MappingProxyType({})
"""Of an endpoint that calls everything as `SamplingParams` does."""


def sampling_params(
    body: SamplingBody,
    defaults: Mapping[str, Any],
    *,
    names: Mapping[str, str] = NO_NAMES,
    **others: Any,
) -> SamplingParams:
    """What the body says of sampling, and the model's defaults where it says nothing.

    Fields that endpoints spell differently come in `others`; `names` are those spellings.
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
    with rename_params(names):
        return SamplingParams(**{**defaults, **said})


def _logit_bias(bias: Mapping[str, float]) -> dict[int, float]:
    if not all(token.isascii() and token.isdecimal() for token in bias):
        wrong = next(token for token in bias if not (token.isascii() and token.isdecimal()))
        raise invalid_request(f"logit_bias names {wrong!r}; it is a map of token ids", "logit_bias")
    return {int(token): float(value) for token, value in bias.items()}


def reasoning_budget(body: SamplingBody, template: ChatTemplateKwargs | None) -> int | None:
    """The one budget that a request states, in whichever spelling."""
    return one_of(_budget_spellings(body, template))


def budget_name(body: SamplingBody, template: ChatTemplateKwargs | None) -> str:
    """What the request calls it."""
    spellings = _budget_spellings(body, template)
    return next((name for name, value in spellings.items() if value is not None), _BUDGET)


def _budget_spellings(
    body: SamplingBody, template: ChatTemplateKwargs | None
) -> dict[str, int | None]:
    spellings = {
        _BUDGET: body.reasoning_budget,
        "thinking_token_budget": body.thinking_token_budget,
    }
    if template is not None:
        spellings |= {
            "chat_template_kwargs.reasoning_budget": template.reasoning_budget,
            "chat_template_kwargs.thinking_token_budget": template.thinking_token_budget,
        }
    return spellings


def one_of(spellings: Mapping[str, Any]) -> Any:
    """The value under several names for one thing, which must agree where more than one is set."""
    said = {name: value for name, value in spellings.items() if value is not None}
    values = list(said.values())
    if any(value != values[0] for value in values):
        listed = ", ".join(f"{name} = {value!r}" for name, value in said.items())
        raise invalid_request(
            f"{listed}: these name one setting; give one of them", next(iter(said))
        )
    return values[0] if values else None


@dataclass(frozen=True, kw_only=True)
class Thinking:
    """What a request says of reasoning, whatever words it used; None is the template's default."""

    is_enabled: bool | None = None
    keeps_history: bool | None = None
    effort: str | None = None
    budget: int | None = None
    budget_hint: int | None = None
    forces_content: bool = False

    def template_options(self) -> dict[str, Any]:
        """Keyword arguments of `prepare_chat`."""
        options = {
            "enable_thinking": self.is_enabled,
            "truncate_history_thinking": None
            if self.keeps_history is None
            else not self.keeps_history,
            "effort": self.effort,
            "budget_hint": self.budget_hint,
            "force_nonempty_content": self.forces_content or None,
        }
        return {name: value for name, value in options.items() if value is not None}


def resolve_thinking(
    body: SamplingBody, template: ChatTemplateKwargs | None, effort: str | None
) -> Thinking:
    """Join `reasoning_effort`, `chat_template_kwargs` and the budget into one thing.

    `none` is a closed `<think></think>`; `high` is how the models think without being told; `low`
    and `medium` are the hints that Super and Ultra were trained with, and an error elsewhere.
    """
    thinking = Thinking(budget=reasoning_budget(body, template))
    said: dict[str, str | None] = {"reasoning_effort": effort}
    if template is not None:
        if template.low_effort:
            said["chat_template_kwargs.low_effort"] = "low"
        if template.medium_effort:
            said["chat_template_kwargs.medium_effort"] = "medium"
        keeps = template.truncate_history_thinking
        thinking = replace(
            thinking,
            is_enabled=template.enable_thinking,
            keeps_history=None if keeps is None else not keeps,
            budget_hint=template.budget_hint,
            forces_content=bool(template.force_nonempty_content),
        )
    chosen = one_of(said)
    if chosen == "none":
        if thinking.is_enabled:
            raise invalid_request(
                "reasoning_effort is 'none' and chat_template_kwargs.enable_thinking is true; "
                "leave one out",
                "reasoning_effort",
            )
        return replace(thinking, is_enabled=False)
    if chosen is not None and thinking.is_enabled is False:
        raise invalid_request(
            f"reasoning_effort is {chosen!r} and chat_template_kwargs.enable_thinking is false; "
            f"leave one out",
            "reasoning_effort",
        )
    return replace(thinking, effort=None if chosen == "high" else chosen)


def structured_output(body: StructuredOutputsBody | None) -> StructuredOutput | None:
    """The one form that vLLM's `structured_outputs` names."""
    if body is None:
        return None
    said: dict[GrammarKind, Any] = {
        "json_schema": body.json_schema,
        "regex": body.regex,
        "choice": body.choice,
        "grammar": body.grammar,
        "json_object": True if body.json_object else None,
    }
    named: list[tuple[GrammarKind, Any]] = [each for each in said.items() if each[1] is not None]
    if len(named) != 1:
        found = ", ".join("json" if kind == "json_schema" else kind for kind, _ in named)
        raise invalid_request(
            f"structured_outputs has {found or 'nothing'}; give one of json, regex, choice, "
            f"grammar, json_object",
            "structured_outputs",
        )
    kind, value = named[0]
    return StructuredOutput(
        kind=kind,
        value=None if kind == "json_object" else value,
        source=f"structured_outputs.{'json' if kind == 'json_schema' else kind}",
    )
