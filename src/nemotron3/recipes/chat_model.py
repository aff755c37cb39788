"""The chat template of a model, and models and adapters saved with it and with stop tokens."""

from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from nemotron3.config import write_json
from nemotron3.errors import ConfigError
from nemotron3.models.huggingface.companions import GENERATION_FILE, Companions
from nemotron3.models.lora import LoRAConfig, write_adapter
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
    generation = _ending_turns(model.companions, tokenizer)
    model.companions = replace(model.companions, generation_config=generation)
    model.save_pretrained(folder)
    _save_tokenizer(tokenizer, template, folder)


def save_chat_adapter(
    model: LanguageModel,
    lora: LoRAConfig,
    tokenizer: Tokenizer,
    template: ChatTemplate,
    folder: Path,
    *,
    base: str,
) -> None:
    """Write the adapter of a model, with what its chats need beside the `base` model."""
    assert model.companions is not None
    write_adapter(folder, model, lora, base=base)
    write_json(folder / GENERATION_FILE, _ending_turns(model.companions, tokenizer))
    _save_tokenizer(tokenizer, template, folder)


def _ending_turns(companions: Companions, tokenizer: Tokenizer) -> dict[str, Any]:
    """The model's generation_config.json, with the tokens that end a turn."""
    generation = dict(companions.generation_config or {"_from_model_config": True})
    listed: Any = generation.get("eos_token_id")
    known = cast(list[int], listed) if isinstance(listed, list) else [listed]
    ends = [token for token in (*known, *tokenizer.stop_ids) if token is not None]
    return generation | {"eos_token_id": [*dict.fromkeys(ends)]}


def _save_tokenizer(tokenizer: Tokenizer, template: ChatTemplate, folder: Path) -> None:
    tokenizer.chat_template = template.to_jinja()
    tokenizer.save(folder)
