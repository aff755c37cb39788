"""`nemotron3 generate`: continue a text, printed while it is written."""

import argparse

from nemotron3.cli import terminal
from nemotron3.inference.config import EngineConfig
from nemotron3.inference.llm import LLM
from nemotron3.inference.output_processor import AnswerDelta
from nemotron3.inference.requests import SamplingParams
from nemotron3.recipes.input_files import check_model_directory
from nemotron3.runtime.devices import resolve_device
from nemotron3.text import ContentDelta


def generate_command(known: argparse.Namespace) -> int:
    """Load a model directory and write on from the prompt."""
    device = resolve_device(known.device)
    params = SamplingParams(
        max_tokens=known.max_tokens,
        temperature=known.temperature,
        top_p=known.top_p,
        top_k=known.top_k,
        seed=known.seed,
    )
    config = EngineConfig(max_num_seqs=1)
    check_model_directory(known.path)
    llm = LLM(known.path, device=device.type, config=config, lora=known.lora)
    is_begun = False

    def show(_: int, delta: AnswerDelta) -> None:
        nonlocal is_begun
        if not is_begun:  # whatever can be refused has been
            terminal.write(known.prompt)
            is_begun = True
        for part in delta.parts:
            assert isinstance(part, ContentDelta), "a text has no reasoning and no calls"
            terminal.write(part.text)

    llm.generate(known.prompt, params, on_delta=show)
    print()
    return 0
