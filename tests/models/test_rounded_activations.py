"""Models whose products round their activations: near the model that does not, and run as any."""

import pytest
import torch
from torch.nn import functional as F

from nemotron3 import LLM, LanguageModel, SamplingParams
from nemotron3.errors import ConfigError
from nemotron3.inference.base_llm import load_model
from nemotron3.inference.config import EngineConfig
from nemotron3.models.parameter import state_tensors
from nemotron3.models.precision import convert_weights
from nemotron3.models.rounded_activations import can_round_activations, round_activations
from nemotron3.ops.weights import ExpertMatrices, QuantizedWeight
from tests.models.test_modelopt import CONFIG, publish
from tests.tiny import WHOLE_BLOCKS, tiny_config, tiny_model, tokens_for
from tests.tolerances import INT8_ACTIVATIONS

DENSE = tiny_config("M-*-M-/*-", **WHOLE_BLOCKS)
WHOLE = tiny_config("MEM*E-ME/*E", **WHOLE_BLOCKS)
ROUNDED = EngineConfig(activations="int8")
PROMPTS = [[1, 2, 3, 4, 5, 6, 7], [9, 8], [20] * 40]


def kl(ours, theirs):
    p, q = (F.log_softmax(logits.double(), -1) for logits in (ours, theirs))
    return (p.exp() * (p - q)).sum(-1).mean()


@pytest.mark.parametrize("weights", ["int8", "nvfp4"])
@torch.no_grad()
def test_is_near_the_model_that_does_not(weights):
    model = convert_weights(tiny_model(WHOLE), weights)
    tokens = tokens_for(WHOLE, 2, 37)
    before = model(tokens)
    rounded = round_activations(model, "int8")
    # Random weights: where rounding changes which experts a token goes to, much changes.
    assert 1e-9 < kl(before, rounded(tokens)) < 0.1
    assert torch.equal(model(tokens), before)
    ours = dict(state_tensors(rounded))
    for name, value in state_tensors(model):
        if isinstance(value, QuantizedWeight):
            assert (value.activations, ours[name].activations) == (None, "int8"), name
            assert next(value.buffers()).data_ptr() == next(ours[name].buffers()).data_ptr()
        else:
            assert value.data_ptr() == ours[name].data_ptr()


@torch.no_grad()
def test_the_engine_agrees_with_one_forward_pass():
    """But where float32's own rounding changed a code: the scan adds a prompt in another order."""
    model = round_activations(convert_weights(tiny_model(DENSE), "nvfp4"), "int8")
    params = SamplingParams(max_tokens=16, temperature=0.0, logprobs=0, ignore_eos=True)
    for prompt, output in zip(PROMPTS, LLM(model).generate(PROMPTS, params), strict=True):
        answer = output.outputs[0]
        ids = torch.tensor([[*prompt, *answer.token_ids]])
        every = model(ids)[0].log_softmax(-1)[len(prompt) - 1 : -1]
        theirs = every.gather(-1, ids[0, len(prompt) :].unsqueeze(-1)).squeeze(-1)
        ours = torch.tensor([entry.logprob for entry in answer.logprobs])
        assert (ours - theirs).abs().max() < INT8_ACTIVATIONS


def test_a_model_in_memory_is_rounded_for_an_engine_alone():
    model = convert_weights(tiny_model(WHOLE), "int8")
    params = SamplingParams(max_tokens=4, temperature=0.0, logprobs=0, ignore_eos=True)
    rounded, plain, other = (
        llm.generate(PROMPTS, params)[0].outputs[0].logprobs[0].logprob
        for llm in (
            LLM(model, config=ROUNDED),
            LLM(model),
            LLM(round_activations(model, "int8")),
        )
    )
    assert rounded == other != plain
    assert all(w.activations is None for w in model.modules() if isinstance(w, QuantizedWeight))


@torch.no_grad()
def test_a_mix_is_rounded_where_its_elements_are_integers(tmp_path):
    plain = tmp_path / "plain"
    tiny_model(CONFIG).save_pretrained(plain)
    publish(plain, tmp_path / "published")
    model = LLM(load_model(tmp_path / "published", device="cpu"), config=ROUNDED)._engine.model
    found = {}
    for _, value in state_tensors(model):
        if isinstance(value, QuantizedWeight):
            found.setdefault(value.format, set()).add(value.activations)
    assert found == {"nvfp4": {"int8"}, "fp8": {None}}
    assert any(isinstance(m, ExpertMatrices) for m in model.modules())
    assert LLM(model).generate(PROMPTS, SamplingParams(max_tokens=3, ignore_eos=True))


def test_models_without_integers_are_refused():
    model = tiny_model(WHOLE)
    assert not can_round_activations(model)
    with pytest.raises(ConfigError, match="matrices are plain; only those in int8 and nvfp4"):
        round_activations(model, "int8")
    fp8 = convert_weights(model, "fp8")
    assert not can_round_activations(fp8)
    with pytest.raises(ConfigError, match="matrices are in fp8; only those in int8 and nvfp4"):
        round_activations(fp8, "int8")
    wide = convert_weights(model, "int8")
    assert can_round_activations(wide)
    wide.activation_dtype = torch.bfloat16
    with pytest.raises(ConfigError, match=r"computes in torch\.bfloat16"):
        round_activations(wide, "int8")
    with pytest.raises(ConfigError, match="is 'int4'; products round their activations to int8"):
        round_activations(convert_weights(model, "int8"), "int4")
    with pytest.raises(ConfigError, match="matrices are plain"):
        LLM(model, config=ROUNDED)


def test_other_devices_are_refused():
    with torch.device("meta"):
        model = LanguageModel(WHOLE)
    with pytest.raises(ConfigError, match="the model is on meta; products of integers are for"):
        round_activations(model, "int8")
