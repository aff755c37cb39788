"""A study of seconds: a small policy with random weights, and environments that need no skill."""

from dataclasses import replace

from nemotron3.recipes.own_environments import own_environments
from nemotron3.rl.curriculum import CurriculumConfig
from nemotron3.rl.rollouts import RolloutConfig
from nemotron3.rl.sampling_plan import EnvironmentConfig
from nemotron3.studies.simultaneous_rl import SimultaneousRL
from nemotron3.studies.simultaneous_rl.cell import Evaluation, Score

ENVIRONMENT = """
from tests.rl.playground import {base}


class Toy({base}):
    name = "{name}"
"""


def toy_study(model, folder, **changes):
    """Two environments, two updates a stage, two prompts of each environment in a batch."""
    files = []
    for name, base in (("even", "Parity"), ("uneven", "OtherParity")):
        files.append(folder / f"{name}.py")
        files[-1].write_text(ENVIRONMENT.format(name=name, base=base), encoding="utf-8")
    run = own_environments(
        model,
        [EnvironmentConfig(name=str(file)) for file in files],
        group_size=4,
        steps=2,
        max_context=64,
    )
    return toy_settings(run, **changes)


def toy_settings(run, **changes):
    """The toy study of any run; nothing is read."""
    run = replace(
        run,
        device="cpu",
        training=replace(run.training, batch_size=16, microbatch_size=4),
        rollouts=RolloutConfig(max_tokens=6, max_context=64, enable_thinking=False),
        max_num_seqs=32,
    )
    settings = {
        "steps": 4,
        "learning_rates": (1e-2,),
        "num_seeds": 1,
        "curriculum": CurriculumConfig(pool=4, samples=4),
        "held_out_tasks": 6,
    }
    return SimultaneousRL(run=run, **settings | changes)


def evaluation(updates, **rewards):
    """An evaluation with these rewards; a pair is reward and share of the most common answer."""
    pairs = {name: r if isinstance(r, tuple) else (r, 0.1) for name, r in rewards.items()}
    return Evaluation(
        updates=updates,
        scores={
            name: Score(reward=reward, most_common=common, num_tasks=50)
            for name, (reward, common) in pairs.items()
        },
    )
