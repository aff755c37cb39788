"""Each parameter in turn: an engine whose weights change is a new engine with these weights.

Engines elsewhere have kept what was derived from old weights: packed or quantized copies, recorded
steps, -exp(A_log). So one tensor at a time is changed, and everything is compared.
"""

from dataclasses import replace

import pytest

from nemotron3.inference.config import EngineConfig
from nemotron3.inference.engine import Engine
from nemotron3.inference.requests import SamplingParams
from nemotron3.inference.sequences import EngineRequest
from nemotron3.models.nemotron_h import LanguageModel
from nemotron3.models.precision import convert_weights
from nemotron3.ops.weights import FORMATS
from tests.tiny import WHOLE_BLOCKS, qwen_config, tiny_config, tiny_model, tokens_for

CONFIGS = {
    "every layer": tiny_config("MEM*E-/*E"),
    "wide experts": tiny_config("M-*E/*E", moe={"moe_latent_size": None}),
    "tied": tiny_config("M*-/*E", tie_word_embeddings=True),
    "rotary": qwen_config(),
}
PARAMS = SamplingParams(max_tokens=6, temperature=0.0, logprobs=0, ignore_eos=True)


def engine_for(model):
    limits = {"max_num_seqs": 3, "page_size": 4, "prefix_interval": 4, "max_model_len": 64}
    depths = model.config.pattern.num_mtp_depths
    drafts = {"max_draft_tokens": 2 if depths else 0, "adapts_drafts": False}
    return Engine(model, EngineConfig(**limits, **drafts))


def observed(engine, name):
    """Log-probabilities of prompts and answers, and the drafts of every step."""
    config = engine.model.config
    for index in range(3):
        prompt = tuple(tokens_for(config, 5 + 6 * index, seed=index).tolist())
        # Only prompts without log-probabilities begin with cached prefixes.
        params = replace(PARAMS, prompt_logprobs=None if index else 0)
        engine.add(EngineRequest(request_id=f"{name}{index}", prompt=prompt, params=params))
    scores, drafts = [], []
    while engine.has_work:
        for delta in engine.step():
            known = () if delta.prompt is None else delta.prompt.logprobs
            scores += [(e.token, e.logprob) for e in (*known, *delta.logprobs) if e is not None]
        drafts += [tuple(sequence.drafts) for sequence in engine.scheduler.running]
    return scores, drafts


def plain_copy(model):
    copy = LanguageModel.from_config(model.config)
    copy.load_state_dict(model.state_dict())
    return copy


@pytest.mark.long
@pytest.mark.parametrize(
    ("name", "how"),
    [
        ("every layer", "in place"),
        ("every layer", "by name"),
        ("every layer", "from a directory"),
        ("wide experts", "in place"),
        ("tied", "in place"),
        ("rotary", "in place"),
    ],
)
def test_whatever_changes_is_used(name, how, tmp_path):
    config = CONFIGS[name]
    model, other = tiny_model(config), tiny_model(config, seed=5).state_dict()
    plain = plain_copy(model)
    engine = engine_for(model)
    before, moved_drafts = observed(engine, "before"), 0
    for key, tensor in plain.state_dict().items():
        tensor.copy_(other[key])
        if how == "in place":
            model.state_dict()[key].copy_(other[key])
            engine.invalidate_caches()
        elif how == "by name":
            engine.update_weights(plain.state_dict())
        else:
            plain.save_pretrained(tmp_path / key)
            engine.update_weights(tmp_path / key)
        now = observed(engine, key)
        assert now == observed(engine_for(plain_copy(plain)), "new"), key
        if key.startswith("mtp."):
            moved_drafts += now[1] != before[1]
        else:
            assert now[0] != before[0], f"{key} does nothing"
        before = now
    assert moved_drafts or not config.pattern.num_mtp_depths


@pytest.mark.long
@pytest.mark.parametrize("weights", FORMATS)
def test_whatever_changes_is_quantized_anew(weights):
    config = tiny_config("MEM*E-/*E", **WHOLE_BLOCKS)
    plain, other = tiny_model(config), tiny_model(config, seed=5).state_dict()
    engine = engine_for(convert_weights(plain_copy(plain), weights))
    before = observed(engine, "before")
    for key, tensor in plain.state_dict().items():
        tensor.copy_(other[key])
        engine.update_weights(plain.state_dict())
        now = observed(engine, key)
        new = engine_for(convert_weights(plain_copy(plain), weights))
        assert now == observed(new, "new"), key
        assert key.startswith("mtp.") or now[0] != before[0], f"{key} does nothing"
        before = now
