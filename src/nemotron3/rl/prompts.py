"""Prompts that leave a policy no room to answer, told before anything is played."""

from collections.abc import Sequence

from nemotron3.environments.rows import Row, environment_of, prompt_text
from nemotron3.errors import ConfigError
from nemotron3.rl.rollouts import RolloutConfig, render_prompt
from nemotron3.text import ChatTemplate, Tokenizer

_SHOWN = 60
"""Characters of a prompt in an error."""


def check_prompts(
    rows: Sequence[Row], config: RolloutConfig, template: ChatTemplate, tokenizer: Tokenizer
) -> None:
    """Raise ConfigError for tasks whose prompts fill the context: no answer has a token there."""
    lengths = [len(render_prompt(row, config, template).tokens(tokenizer).ids) for row in rows]
    longest = max(range(len(rows)), key=lengths.__getitem__, default=None)
    if longest is None or lengths[longest] < config.max_context:
        return
    row, length = rows[longest], lengths[longest]
    full = sum(count >= config.max_context for count in lengths)
    text = " ".join(prompt_text(row).split())
    shown = text if len(text) <= _SHOWN else text[: _SHOWN - 1] + "\N{HORIZONTAL ELLIPSIS}"
    raise ConfigError(
        f"is {config.max_context}, which {full} of {len(rows)} prompts fill, so that nothing can "
        f"be answered; the longest, of {environment_of(row)}, has {length} tokens ({shown!r}). "
        f"Raise it to {length + config.max_tokens}, or take easier or shorter tasks",
        field="rollouts.max_context",
    )
