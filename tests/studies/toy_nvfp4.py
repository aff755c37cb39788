"""A study of seconds: a small model whose products fit NVFP4, on text made on the spot."""

from dataclasses import replace

from nemotron3.studies.nvfp4 import NVFP4Study
from tests.small_run import VOCABULARY, small_run, write_text
from tests.tiny import tiny_config

SIZES = {
    "hidden_size": 32,
    "vocab_size": VOCABULARY,
    "mamba": {"mamba_num_heads": 4, "ssm_state_size": 16},
    "moe": {"moe_intermediate_size": 32, "moe_shared_expert_intermediate_size": 32},
}


def toy_study(folder, **changes):
    """Eight updates of a model with Mamba, experts and a tail of attention, one seed."""
    run = replace(
        small_run(write_text(folder / "text", documents=20)),
        model=tiny_config("MEM*E*/*E/*E", **SIZES),
    )
    return NVFP4Study(run=run, **{"steps": 8, "num_seeds": 1} | changes)
