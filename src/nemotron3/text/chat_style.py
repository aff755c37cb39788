r"""The differences between the chat templates of the releases, as data.

All write turns as `<|im_start|>ROLE\n … <|im_end|>\n` and tools as XML; what differs is the glue
around the reasoning and the hints that a request may append to the last user message.

| style     | after the reasoning | hints                                                       |
|-----------|---------------------|-------------------------------------------------------------|
| nano      | `\n</think>\n`      | token budget (in the template that it was trained with)     |
| super     | `\n</think>\n`      | effort low                                                  |
| ultra     | `</think>`          | effort medium                                               |
| lightning | `</think>`          | none                                                        |

Sources: the released Nano template, NVIDIA-NeMo/Nemotron `data_prep/templates/nano3.jinja` and
`lightning35.jinja`; the Super hint from the deployment notes of its providers.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from nemotron3.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class ChatStyle:
    """The choices in which the releases' templates differ.

    `efforts` maps an effort to the hint that asks for it. `budget_hint` is the text around a
    number of tokens, with `{}` in its place; it informs the model and enforces nothing.
    """

    name: str
    reasoning_end: str = "\n</think>\n"
    strips_content_before_calls: bool = True
    efforts: Mapping[str, str] = field(default_factory=dict[str, str])
    budget_hint: str | None = None

    def hint(self, *, effort: str | None, budget: int | None) -> str:
        """What is appended to the last user message; an unknown hint is an error."""
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
    )
}
"""The styles of the published models, by name."""


def chat_style(name: str) -> ChatStyle:
    """A published style by its name."""
    if name not in CHAT_STYLES:
        raise ConfigError(f"chat style {name!r} is unknown; known: {', '.join(CHAT_STYLES)}")
    return CHAT_STYLES[name]


def style_of_template(source: str) -> ChatStyle | None:
    """Which style a Jinja template of the family is, or None where it is of another family.

    Told by what only that template says, so that a published model directory needs no setting
    beside it. A template that is not recognised has to be rendered as Jinja.
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
