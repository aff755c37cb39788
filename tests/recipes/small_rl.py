"""Small runs of reinforcement learning, and how they are interrupted."""

from dataclasses import replace

from nemotron3.observe.metrics import read_metrics
from nemotron3.recipes.own_environments import own_environments
from nemotron3.rl.rollouts import RolloutConfig
from nemotron3.rl.sampling_plan import EnvironmentConfig

LETTER = '''
from nemotron3.environments.environment import Environment
from nemotron3.environments.verification import Verification


class Letter(Environment):
    """Rewards answers by their share of one letter."""

    name = "letter"

    def draw(self, random):
        return self.row(f"say {random.randrange(10**6)}")

    async def verify(self, row, response, session):
        said = "".join(turn.content + (turn.reasoning or "") for turn in response.turns)
        return Verification(reward=said.count("e") / max(len(said), 1), info={"answer": said})
'''
"""A user's own environment, as a file."""


def small(policy, *names, steps=2, group_size=4, prompts=2, lr=1e-2, **changes):
    run = own_environments(
        policy,
        [EnvironmentConfig(name=name) for name in names],
        name="small",
        steps=steps,
        group_size=group_size,
        max_context=96,
        learning_rate=lr,
    )
    training = {"batch_size": prompts * group_size} | changes.pop("training", {})
    changes = {
        "device": "cpu",
        "rollouts": RolloutConfig(max_tokens=12, max_context=96, enable_thinking=False),
        "held_out_tasks": 4,
        "final_held_out_tasks": 6,
        "max_num_seqs": 32,
    } | changes
    return replace(run, training=replace(run.training, **training), **changes)


def metrics_of(folder):
    return dict(read_metrics(folder / "metrics.jsonl"))
