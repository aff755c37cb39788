"""Render a Jinja chat template: a user's own, or one of another family.

This is the only module that imports jinja2 (a dependency of PyTorch), and it is imported only when
there is a Jinja template to render. The environment is that of transformers: sandboxed, with
trimmed blocks, a `tojson` that escapes nothing, `raise_exception` and `strftime_now`. The result is
one string, whose encoding turns special tokens in the messages into tokens; `chat.ChatTemplate`
avoids that for the family's templates.
"""

import json
from collections.abc import Sequence
from datetime import datetime
from functools import lru_cache
from typing import Any, NoReturn, cast

from jinja2 import Template, TemplateError, TemplateSyntaxError
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from nemotron3.errors import DataError


def render_jinja(
    source: str,
    messages: Sequence[dict[str, Any]],
    *,
    tools: Sequence[dict[str, Any]] | None = None,
    add_generation_prompt: bool = True,
    **settings: Any,
) -> str:
    """The text of a conversation; `settings` are a request's `chat_template_kwargs`.

    Raises `DataError` if the template is not valid Jinja, or refuses the conversation.
    """
    try:
        return _compiled(source).render(
            messages=messages,
            tools=tools,
            add_generation_prompt=add_generation_prompt,
            **settings,
        )
    except TemplateError as error:
        raise DataError(
            f": the chat template refuses this conversation: {error}", field="messages"
        ) from error
    except (TypeError, KeyError, ValueError) as error:
        raise DataError(
            f": the chat template fails on this conversation ({error!r}): it expects other fields",
            field="messages",
        ) from error


@lru_cache(maxsize=16)
def _compiled(source: str) -> Template:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols]
    )
    filters = cast(dict[str, Any], environment.filters)  # pyright: ignore[reportUnknownMemberType]
    filters["tojson"] = _to_json
    names = cast(dict[str, Any], environment.globals)  # pyright: ignore[reportUnknownMemberType]
    names.update(raise_exception=_refuse, strftime_now=_now)
    try:
        return environment.from_string(source)
    except TemplateSyntaxError as error:
        raise DataError(
            f"the chat template is not Jinja (line {error.lineno}: {error.message})"
        ) from error


def _to_json(value: Any, indent: int | None = None) -> str:
    return json.dumps(value, ensure_ascii=False, indent=indent)


def _refuse(message: str) -> NoReturn:
    raise TemplateError(message)


def _now(form: str) -> str:
    return datetime.now().strftime(form)
