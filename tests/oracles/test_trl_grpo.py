"""Our loss and advantages against those of TRL's GRPO trainer, on the settings that both have.

`trl_grpo.json` holds TRL's results; `trl_grpo.py` says how they come about. The two differ in this:

* TRL's baseline is the mean of the whole group, ours that of the others. Advantages differ by the
  factor n / (n - 1), the same for all of a group.
* TRL divides by the sample deviation + 1e-4, we by that of the population + 1e-6.
* With one update for a batch the ratio of PPO is 1, so TRL's clipping, which we do not have,
  never applies.
* TRL multiplies its KL by the ratio unless `use_bias_correction_kl` is off.
"""

import json
from functools import cache

import pytest
import torch
from torch.nn import functional as F

from nemotron3.models.nemotron_h import ModelOutput
from nemotron3.ops.segments import Segments
from nemotron3.rl.advantages import AdvantageConfig, group_advantages
from nemotron3.rl.policy_objective import PolicyBatch, PolicyLossConfig, PolicyObjective
from tests.oracles.trl_grpo import CASES, FILE, GROUP, VOCABULARY, WIDTH, given
from tests.tolerances import FLOAT32

CORRECTIONS = {None: "none", "token_truncate": "clip", "token_mask": "mask"}
"""TRL's mode of importance sampling, and our name for it. Without one TRL takes the policy's own
log-probabilities for those of sampling."""


@cache
def record():
    return json.loads(FILE.read_text(encoding="utf-8"))


def test_the_file_is_of_these_inputs_and_settings():
    assert record()["given"] == given()
    assert {name: case["settings"] for name, case in record()["cases"].items()} == CASES


def loss_config(settings):
    """Ours for TRL's settings."""
    mode = settings.get("vllm_importance_sampling_mode")
    bounds = {
        "lowest": settings.get("vllm_importance_sampling_clip_min", 0.5),
        "highest": settings.get("vllm_importance_sampling_clip_max", 5.0),
    }
    return PolicyLossConfig(
        correction=CORRECTIONS[mode],
        sequence_threshold=None,
        kl=settings.get("beta", 0.0),
        **bounds,
    )


class Policy:
    """The policy without layers of the oracle."""

    def __init__(self, weights):
        self.parameters = {
            name: torch.tensor(values).view(VOCABULARY, WIDTH).requires_grad_()
            for name, values in weights.items()
        }

    def output(self, tokens):
        embedding, head = self.parameters.values()
        hidden = F.rms_norm(embedding[tokens], (WIDTH,), eps=1e-6)
        return ModelOutput(
            hidden=[hidden], output_weight=head, routings=[], mtp_routings=[], residual_rms=[]
        )

    @torch.no_grad()
    def logprobs(self, tokens, targets):
        output = self.output(tokens)
        logits = output.hidden[0] @ output.output_weight.T
        return logits.log_softmax(-1).gather(1, targets[:, None])[:, 0]


def batch_of(places, case, policy, reference):
    """The answers in these places as one packed batch."""
    inputs, advantages = record()["given"], case["advantages"]
    is_corrected = "vllm_importance_sampling_mode" in case["settings"]
    prompts, answers, noise = (
        [inputs[name][place] for place in places] for name in ("prompts", "answers", "noise")
    )
    ids = [prompt + answer for prompt, answer in zip(prompts, answers, strict=True)]

    def spread(values):
        """Of each answer's tokens, after zeros for the prompt's."""
        parts = zip(prompts, values, strict=True)
        return torch.tensor([x for p, of in parts for x in [0.0] * (len(p) - 1) + of])

    tokens = torch.tensor([token for each in ids for token in each[:-1]])
    targets = torch.tensor([token for each in ids for token in each[1:]])
    return PolicyBatch(
        tokens=tokens,
        targets=targets,
        mask=spread([[1.0] * len(answer) for answer in answers]),
        weights=spread([[advantages[place]] * len(inputs["answers"][place]) for place in places]),
        sampled_logprobs=policy.logprobs(tokens, targets) + is_corrected * spread(noise),
        reference_logprobs=reference.logprobs(tokens, targets),
        segments=Segments([len(each) - 1 for each in ids]),
    )


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("microbatches", [1, 3])
def test_loss_and_gradients_are_those_of_trl(name, microbatches, assert_close):
    case, inputs = record()["cases"][name], record()["given"]
    policy, reference = Policy(inputs["policy"]), Policy(inputs["reference"])
    objective = PolicyObjective(loss_config(case["settings"]))
    size = len(inputs["answers"]) // microbatches
    batches = [
        batch_of(range(first, first + size), case, policy, reference)
        for first in range(0, len(inputs["answers"]), size)
    ]
    counts = {"tokens": sum(objective.counts(batch)["tokens"] for batch in batches)}
    counts["current"] = counts["tokens"]
    shares = [objective.loss(policy.output(batch.tokens), batch, counts) for batch in batches]
    loss = sum(share.total for share in shares)
    loss.backward()
    assert loss.item() == pytest.approx(case["loss"], rel=FLOAT32)
    for parameter, found in policy.parameters.items():
        expected = torch.tensor(case["gradients"][parameter]).view_as(found)
        assert expected.abs().max() > 0.01
        assert_close(found.grad, expected, FLOAT32)
    kept = sum(share.metrics["policy/kept"].item() for share in shares)
    if "masked" in name:
        assert 0.2 < kept < 0.8
    else:
        assert kept == pytest.approx(1.0)


@pytest.mark.parametrize("name", ["on policy", "rewards as they are"])
def test_advantages_are_those_of_trl_but_for_the_baseline_and_the_epsilon(name):
    case, rewards = record()["cases"][name], record()["given"]["rewards"]
    is_plain = case["settings"].get("scale_rewards") == "none"
    config = AdvantageConfig(deviation="none" if is_plain else "group", clamp=None)
    for first in range(0, len(rewards), GROUP):
        group = torch.tensor(rewards[first : first + GROUP], dtype=torch.float64)
        ours = group_advantages(group.tolist(), config)
        theirs = torch.tensor(case["advantages"][first : first + GROUP], dtype=torch.float64)
        if not is_plain:
            ours = ours * (group.std(correction=0) + 1e-6)
            theirs = theirs * (group.std() + 1e-4)
        assert torch.allclose(ours, theirs * GROUP / (GROUP - 1), atol=1e-6)
