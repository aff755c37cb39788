"""`nemotron3 generate`: continue a text, shown as it comes."""

import argparse

from nemotron3.cli import terminal
from nemotron3.models.generation import GenerationConfig
from nemotron3.models.nemotron_h import LanguageModel
from nemotron3.parallel.devices import resolve_device
from nemotron3.text import Tokenizer


def generate_command(known: argparse.Namespace) -> int:
    """Load a model directory and write on from the prompt."""
    device = resolve_device(known.device)
    tokenizer = Tokenizer.from_directory(known.path)
    model = LanguageModel.from_pretrained(known.path, device=device)
    config = GenerationConfig(
        max_new_tokens=known.max_new_tokens,
        temperature=known.temperature,
        top_p=known.top_p,
        top_k=known.top_k,
        seed=known.seed,
        stop_token_ids=tokenizer.stop_ids,
    )
    terminal.write(known.prompt)
    written: list[int] = []
    shown = ""

    def show(_: int, token: int) -> None:
        nonlocal shown
        written.append(token)
        text = tokenizer.decode(written, skip_special_tokens=True)
        # A character may be cut between two tokens; it is shown when it is whole.
        if not text.endswith("\ufffd"):
            terminal.write(text[len(shown) :])
            shown = text

    model.generate([tokenizer.encode(known.prompt)], config, on_token=show)
    print()
    return 0
