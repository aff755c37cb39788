"""The chat template of a model, and a model saved with it and the tokens that end its turns."""

from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from nemotron3.errors import ConfigError
from nemotron3.models.nemotron_h import LanguageModel
from nemotron3.text import CHAT_STYLES, ChatTemplate, Tokenizer, chat_style, style_of_template


def chat_template_for(style: str | None, tokenizer: Tokenizer, model: str) -> ChatTemplate:
    """The template of a named style; else the one in the model's directory, or nano's."""
    if style is not None:
        return ChatTemplate(chat_style(style))
    if tokenizer.chat_template is None:
        return ChatTemplate(CHAT_STYLES["nano"])
    found = style_of_template(tokenizer.chat_template)
    if found is None:
        raise ConfigError(
            f"the chat template in {model} is of another family, and does not say which of its "
            f"tokens the model writes; set --chat-style to one of {', '.join(CHAT_STYLES)}"
        )
    return ChatTemplate(found)


def save_chat_model(
    model: LanguageModel, tokenizer: Tokenizer, template: ChatTemplate, folder: Path
) -> None:
    """Write a model that was loaded so that any program ends its turns and renders its chats."""
    assert model.companions is not None
    generation = dict(model.companions.generation_config or {"_from_model_config": True})
    listed: Any = generation.get("eos_token_id")
    known = cast(list[int], listed) if isinstance(listed, list) else [listed]
    ends = [token for token in (*known, *tokenizer.stop_ids) if token is not None]
    generation["eos_token_id"] = [*dict.fromkeys(ends)]
    model.companions = replace(model.companions, generation_config=generation)
    model.save_pretrained(folder)
    tokenizer.chat_template = template.to_jinja()
    tokenizer.save(folder)
