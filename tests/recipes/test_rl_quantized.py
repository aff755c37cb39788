"""Reinforcement learning of an adapter beside quantized weights."""

import pytest
import torch

from nemotron3.errors import ConfigError
from nemotron3.models.lora import LoRAConfig
from nemotron3.models.nemotron_h import LanguageModel
from nemotron3.models.precision import convert_weights
from nemotron3.recipes.memory import run_plan
from nemotron3.recipes.run_rl import rl
from nemotron3.rl.data_parallel import EnginesConfig
from nemotron3.rl.generator import AsyncConfig
from nemotron3.rl.policy_objective import PolicyLossConfig
from nemotron3.text import Tokenizer
from tests.recipes.small_rl import metrics_of, small
from tests.rl.playground import save_policy
from tests.tiny import WHOLE_BLOCKS

LORA = LoRAConfig(rank=2, targets=("all-linear", "lm_head"))


@pytest.fixture(scope="module")
def quantized(tmp_path_factory):
    folder = tmp_path_factory.mktemp("quantized")
    plain = save_policy(folder / "plain", **WHOLE_BLOCKS)
    convert_weights(LanguageModel.from_pretrained(plain), "nvfp4").save_pretrained(folder / "model")
    Tokenizer.from_directory(plain).save(folder / "model")
    return folder / "model"


def run_of(model, letter, **changes):
    training = {"bias_update_rate": 0.0}
    options = {"lora": LORA, "loss": PolicyLossConfig(kl=1e-4), "training": training}
    return small(model, letter, **(options | changes))


@pytest.mark.parametrize(
    ("staleness", "processes"),
    [(0, 0), (1, 0), pytest.param(1, 1, marks=pytest.mark.slow)],
)
def test_the_engine_follows_the_adapter(quantized, letter, tmp_path, staleness, processes):
    """Rollouts of every update are those of its adapter, and the run ends with an adapter alone."""
    run = run_of(
        quantized,
        letter,
        steps=3,
        asynchronous=AsyncConfig(max_staleness=staleness),
        engines=EnginesConfig(num_processes=processes),
    )
    rl(run, runs=tmp_path / "runs")
    folder = tmp_path / "runs/small"
    name = "logprob_error_current" if staleness else "logprob_error"
    assert max(m[f"policy/{name}"] for m in metrics_of(folder).values()) < 1e-5
    assert (folder / "adapter").exists()
    assert not (folder / "model").exists()


def test_memory_is_that_of_the_codes(quantized, letter):
    plan = run_plan(run_of(quantized, letter), torch.device("cpu"))
    plain = run_plan(run_of(quantized.parent / "plain", letter), torch.device("cpu"))
    ours, theirs = ({p.name: p.num_bytes for p in each.parts} for each in (plan, plain))
    for part in ("weights", "engine merged weights"):
        assert ours[part] < 0.6 * theirs[part], part


def test_all_parameters_are_not_trained(quantized, letter, tmp_path):
    with pytest.raises(ConfigError, match=r"holds nvfp4 weights.*--lora.rank 16"):
        rl(run_of(quantized, letter, lora=None), runs=tmp_path / "runs")
