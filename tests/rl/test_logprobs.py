"""Engine and training agree to rounding, also where a trained model has large logits."""

import pytest
import torch

from nemotron3 import EngineConfig
from nemotron3.inference.engine.memory import page_bytes
from nemotron3.models.layout import SequenceLayout
from nemotron3.models.nemotron_h import LanguageModel
from nemotron3.ops.linear import linear
from nemotron3.ops.segments import Segments
from nemotron3.text import Tokenizer
from tests.rl.playground import Chatter, Parity, save_policy
from tests.rl.test_rollouts import driver_for, tasks, training_logprobs
from tests.tiny import randomized
from tests.tolerances import logprob_tolerance


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return Tokenizer.from_directory(save_policy(tmp_path_factory.mktemp("policy")))


def policy_with_gain(folder, gain):
    """The final norm's gain scales all logits; reinforcement learning makes it grow."""
    model = randomized(LanguageModel.from_pretrained(save_policy(folder)))
    with torch.no_grad():
        model.backbone.norm_f.weight.mul_(gain)
    return model


@torch.no_grad()
def largest_logit(model, rollout):
    ids = torch.tensor(rollout.ids)
    return model(
        ids[:-1],
        layout=SequenceLayout(Segments([len(ids) - 1])),
        head=lambda output: linear(output.hidden[0], output.output_weight).abs().amax().item(),
    )


@pytest.mark.parametrize("drafts", [0, 3])
@pytest.mark.parametrize(("gain", "least"), [(1.0, 0.0), (10.0, 40.0)])
def test_log_probabilities_agree_relative_to_the_size_of_logits(
    tmp_path, tokenizer, gain, least, drafts
):
    """Over turns and drafts, and for sequences that are preempted and read again."""
    model = policy_with_gain(tmp_path, gain)
    environments = (Parity(), Chatter())
    crowded = {"max_num_seqs": 8, "max_draft_tokens": drafts, "page_size": 8}
    pages = 36 * page_bytes(model, EngineConfig(**crowded))
    driver = driver_for(
        (model, tokenizer),
        *environments,
        engine=crowded | {"kv_cache_bytes": pages, "prefix_cache_bytes": 0},
        max_tokens=30,
    )
    rows = [row for environment in environments for row in tasks(environment, 4)]
    rollouts = driver.play(rows, group_size=2, seed=1)
    assert driver._llm.stats().preemptions > 0
    assert any(rollout.num_turns > 1 for rollout in rollouts)
    sizes = [largest_logit(model, rollout) for rollout in rollouts]
    assert max(sizes) >= least
    for rollout, size in zip(rollouts, sizes, strict=True):
        sampled = torch.tensor(rollout.is_sampled[1:])
        difference = training_logprobs(model, rollout) - torch.tensor(rollout.logprobs[1:])
        assert difference[sampled].abs().max() < logprob_tolerance(size)
