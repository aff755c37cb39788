"""A study of seconds: a small model whose products fit NVFP4, on text made on the spot."""

from nemotron3.studies.nvfp4 import NVFP4Study
from nemotron3.training.schedules import WSD
from tests.small_run import VOCABULARY, small_run, write_text
from tests.tiny import tiny_config

SIZES = {
    "hidden_size": 32,
    "vocab_size": VOCABULARY,
    "mamba": {"mamba_num_heads": 4, "ssm_state_size": 16},
    "moe": {"moe_intermediate_size": 32, "moe_shared_expert_intermediate_size": 32},
}


def toy_study(folder, **changes):
    """Twelve updates, half of them with a decaying rate, of a model with Mamba, experts and a
    tail of attention; one seed."""
    schedule = WSD(total_steps=8, warmup_steps=2, decay_steps=4)
    run = small_run(
        write_text(folder / "text", documents=20),
        model=tiny_config("MEM*E*/*E/*E", **SIZES),
        training={"schedule": schedule, "microbatch_size": 4},
    )
    return NVFP4Study(run=run, **{"steps": 12, "num_seeds": 1} | changes)
