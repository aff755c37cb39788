"""The reasoning settings of a request: whether to reason, the effort, and the token budget.

A reasoning budget has three names: `reasoning_budget` (NVIDIA's), `thinking_token_budget` (vLLM's),
and either of them inside `chat_template_kwargs`. They are one setting, so different values are an
error.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from nemotron3.server.generation.sampling import SamplingBody, one_of
from nemotron3.server.http.bodies import Body, Unsupported
from nemotron3.server.http.errors import invalid_request

Effort = Literal["none", "low", "medium", "high"]


class ChatTemplateKwargs(Body):
    """Arguments of the family's chat template, and the reasoning budget by its two names."""

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


@dataclass(frozen=True, kw_only=True)
class Thinking:
    """The reasoning settings of a request, from all of its fields."""

    template_options: Mapping[str, Any] = field(default_factory=dict[str, Any])
    """Keyword arguments of `AsyncLLM.prepare_chat`."""
    budget: int | None = None
    """Most tokens of reasoning; None for no limit."""
    names: Mapping[str, str] = field(default_factory=dict[str, str])
    """The request's names of the budget and of the options, if they differ from this package's."""


def reasoning_budget(
    body: SamplingBody, template: ChatTemplateKwargs | None = None
) -> tuple[str, int | None]:
    """The name of the field with the reasoning budget of a request, and the budget."""
    spellings = {
        "reasoning_budget": body.reasoning_budget,
        "thinking_token_budget": body.thinking_token_budget,
    }
    if template is not None:
        spellings |= {
            "chat_template_kwargs.reasoning_budget": template.reasoning_budget,
            "chat_template_kwargs.thinking_token_budget": template.thinking_token_budget,
        }
    return one_of(spellings)


def resolve_thinking(
    body: SamplingBody,
    template: ChatTemplateKwargs | None,
    effort: str | None = None,
    *,
    effort_field: str = "reasoning_effort",
) -> Thinking:
    """Combine the reasoning effort, `chat_template_kwargs` and the budget.

    The effort `none` is a closed `<think></think>`; `high` is the default of the models; `low` and
    `medium` are hints with which Super and Ultra were trained, and an error for other models.
    `effort_field` is the endpoint's name for `effort`.
    """
    budget_name, budget = reasoning_budget(body, template)
    template = template or ChatTemplateKwargs()
    efforts = {
        effort_field: effort,
        "chat_template_kwargs.low_effort": "low" if template.low_effort else None,
        "chat_template_kwargs.medium_effort": "medium" if template.medium_effort else None,
    }
    effort_name, chosen = one_of(efforts)
    is_enabled = template.enable_thinking
    if chosen is not None and is_enabled is (chosen == "none"):
        raise invalid_request(
            f"{effort_name} is {chosen!r} and chat_template_kwargs.enable_thinking is "
            f"{'true' if is_enabled else 'false'}; leave one out",
            effort_name,
        )
    options = {
        "enable_thinking": False if chosen == "none" else is_enabled,
        "truncate_history_thinking": template.truncate_history_thinking,
        "effort": chosen if chosen in ("low", "medium") else None,
        "budget_hint": template.budget_hint,
        "force_nonempty_content": template.force_nonempty_content or None,
    }
    return Thinking(
        template_options={name: value for name, value in options.items() if value is not None},
        budget=budget,
        names={
            "reasoning_budget": budget_name,
            "effort": effort_name,
            "budget_hint": "chat_template_kwargs.budget_hint",
        },
    )
