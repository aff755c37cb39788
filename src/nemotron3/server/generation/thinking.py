"""What a request says of reasoning: whether, how hard, and for how many tokens the model thinks.

A budget of reasoning has three names: `reasoning_budget` (NVIDIA's), `thinking_token_budget`
(vLLM's), and the first inside `chat_template_kwargs`. They are one setting; two that differ are an
error, because whichever won, somebody would not get what they wrote.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

from nemotron3.server.generation.sampling import SamplingBody, one_of
from nemotron3.server.http.bodies import Body, Unsupported
from nemotron3.server.http.errors import invalid_request

Effort = Literal["none", "low", "medium", "high"]
_BUDGET = "reasoning_budget"


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
