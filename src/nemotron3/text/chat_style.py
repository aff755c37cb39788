r"""The differences between the chat templates of the releases, as data.

All write turns as `<|im_start|>ROLE\n … <|im_end|>\n` and tools as XML. They differ in the white
space around the reasoning and in the hints that a request may append to the last user message.

| style     | after the reasoning | hints                                                       |
|-----------|---------------------|-------------------------------------------------------------|
| nano      | `\n</think>\n`      | token budget (in the template of its training)              |
| super     | `\n</think>\n`      | effort low                                                  |
| ultra     | `</think>`          | effort medium                                               |
| lightning | `</think>`          | none                                                        |
| tiny      | `\n</think>\n`      | none                                                        |

`tiny` is that of the models which `make run` trains: they know their tools by heart, and a prompt
does not describe them, which would take twice the tokens of the longest of their chats.

Sources: the released Nano template, NVIDIA-NeMo/Nemotron `data_prep/templates/nano3.jinja` and
`lightning35.jinja`; the Super hint from the deployment notes of its providers.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from nemotron3.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class ChatStyle:
    """The differences between the releases' templates.

    `efforts` maps an effort to the text of its hint. `budget_hint` is the text of the hint for a
    token budget, with `{}` for the number; it informs the model and enforces nothing. `lists_tools`
    says whether a prompt describes the tools that a request offers.
    """

    name: str
    reasoning_end: str = "\n</think>\n"
    strips_content_before_calls: bool = True
    lists_tools: bool = True
    efforts: Mapping[str, str] = field(default_factory=dict[str, str])
    budget_hint: str | None = None

    def hint(self, *, effort: str | None, budget: int | None) -> str:
        """The text for the last user message. Raises ConfigError for a hint without a text."""
        hint = ""
        if effort is not None:
            if effort not in self.efforts:
                known = ", ".join(self.efforts) or "none"
                raise ConfigError(
                    f"= {effort!r}: models of style {self.name!r} were trained with these "
                    f"efforts: {known}; leave it out for full reasoning",
                    field="effort",
                )
            hint += f"\n\n{self.efforts[effort]}"
        if budget is not None:
            if self.budget_hint is None:
                raise ConfigError(
                    f"= {budget}: models of style {self.name!r} were not trained with "
                    f"a budget in the prompt; enforce one while generating instead",
                    field="budget_hint",
                )
            hint += "\n\n" + self.budget_hint.replace("{}", str(budget))
        return hint


CHAT_STYLES: dict[str, ChatStyle] = {
    style.name: style
    for style in (
        ChatStyle(name="nano", budget_hint="{thinking token budget: {}}"),
        ChatStyle(name="super", efforts={"low": "{reasoning effort: low}"}),
        ChatStyle(
            name="ultra",
            reasoning_end="</think>",
            strips_content_before_calls=False,
            efforts={"medium": "{reasoning effort: efficient}"},
        ),
        ChatStyle(name="lightning", reasoning_end="</think>", strips_content_before_calls=False),
        ChatStyle(name="tiny", lists_tools=False),
    )
}
"""The styles of the published models and of the tiny ones, by name."""


def chat_style(name: str) -> ChatStyle:
    """A style by its name. Raises ConfigError for an unknown one."""
    if name not in CHAT_STYLES:
        raise ConfigError(f"chat style {name!r} is unknown; known: {', '.join(CHAT_STYLES)}")
    return CHAT_STYLES[name]


def style_of_template(source: str) -> ChatStyle | None:
    """The style of a Jinja template of the family, or None if it is of another family.

    It is recognised by text that only this template contains, so a published model directory needs
    no extra setting. A template that is not recognised must be rendered as Jinja.
    """
    exported = re.search(r"style (\w+), written by the package nemotron3", source)
    if exported is not None:
        return CHAT_STYLES.get(exported[1])
    if "<|im_start|>" not in source or "truncate_history_thinking" not in source:
        return None
    if "{reasoning effort: efficient}" in source:
        return CHAT_STYLES["ultra"]
    if "{reasoning effort: low}" in source:
        return CHAT_STYLES["super"]
    return CHAT_STYLES["nano" if r"\n</think>\n" in source else "lightning"]
