"""The experts of every token, through chunks, recorded steps, drafts and preemption."""

import pytest
import torch

from nemotron3 import LLM
from nemotron3.inference.config import EngineConfig
from nemotron3.inference.engine import Engine
from nemotron3.inference.engine.memory import page_bytes
from nemotron3.inference.requests import SamplingParams
from nemotron3.inference.sequences import EngineRequest
from nemotron3.models.layout import SequenceLayout
from nemotron3.models.routes import RecordedRoutes
from tests.tiny import tiny_config, tiny_model, tokens_for
from tests.tolerances import DECODE

CONFIG = tiny_config("MEM*EE/*E", eos_token_id=2)
PROMPTS = [tokens_for(CONFIG, n, seed=n).tolist() for n in (17, 1, 30, 9)]
OF_TWO = dict.fromkeys((7, 9), 100.0)
"""With a choice of two tokens, half of the drafts of a model that was never trained stand."""


def run(engine, requests):
    """The last delta of each answer, its tokens and log-probabilities."""
    for each in requests:
        engine.add(each)
    ends, tokens, scores = {}, {}, {}
    while engine.has_work:
        for progress in engine.step():
            key = progress.request_id, progress.index
            tokens.setdefault(key, []).extend(progress.tokens)
            scores.setdefault(key, []).extend(entry.logprob for entry in progress.logprobs)
            assert (progress.routed_experts is None) == (progress.finish_reason is None)
            ends[key] = progress
    return ends, tokens, scores


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("drafts", [0, 3])
@torch.no_grad()
def test_they_are_those_of_one_forward_pass_and_can_be_replayed(drafts, dtype):
    model = tiny_model(CONFIG, dtype=dtype)  # in float32 steps are recorded
    limits = EngineConfig(
        max_num_seqs=3, page_size=4, max_num_batched_tokens=7, prefix_interval=4,
        max_draft_tokens=drafts, adapts_drafts=False, return_routed_experts=True,
    )  # fmt: skip
    pages = 22 * page_bytes(model, limits)
    engine = Engine(model, EngineConfig(**{**vars(limits), "kv_cache_bytes": pages}))
    params = SamplingParams(
        n=2, max_tokens=21, temperature=0.7, seed=1, logprobs=0, ignore_eos=True, logit_bias=OF_TWO
    )
    requests = [EngineRequest(request_id=str(i), prompt=tuple(p), params=params)
                for i, p in enumerate(PROMPTS)]  # fmt: skip
    ends, tokens, scores = run(engine, requests)
    assert engine.stats().preemptions > 0
    assert (engine.stats().accepted_tokens > 0) == (drafts > 0)
    assert engine.stats().prefix_hits == 0
    for (name, index), end in ends.items():
        whole = [*PROMPTS[int(name)], *tokens[name, index]]
        read = torch.tensor(whole[:-1])
        layout = SequenceLayout.packed([len(read)])
        wanted = model(read, layout=layout, head=lambda output: output).routes.backbone
        found = end.routed_experts
        assert found.dtype == torch.int16
        assert found.shape == (len(read), 3, CONFIG.moe.num_experts_per_tok)
        # Those of equal scores may change places, and the order of the chosen is no choice.
        for layer, expected in enumerate(wanted):
            assert torch.equal(found[:, layer].long().sort(-1).values, expected.sort(-1).values)
        again = RecordedRoutes(backbone=[found[:, layer].long() for layer in range(3)])
        logprobs = model(read, layout=layout, routes=again).log_softmax(-1)
        start = len(PROMPTS[int(name)]) - 1
        for row, token, score in zip(logprobs[start:], whole[start + 1 :], scores[name, index],
                                     strict=True):  # fmt: skip
            assert abs(row[token].item() - score) < DECODE


def test_an_answer_that_ends_among_its_drafts_has_its_own_tokens_alone():
    model = tiny_model(CONFIG)
    config = EngineConfig(
        max_num_seqs=1, max_draft_tokens=4, adapts_drafts=False, return_routed_experts=True
    )
    llm = LLM(model, config=config)
    for length in range(1, 8):
        params = SamplingParams(max_tokens=length, temperature=0.0, logit_bias=OF_TWO)
        (output,) = llm.generate([PROMPTS[0]], params)
        answer = output.outputs[0]
        assert len(answer.routed_experts) == 17 + len(answer.token_ids) - 1


def test_they_are_of_the_state_that_new_weights_have_read():
    ours, new = tiny_model(CONFIG), tiny_model(CONFIG, seed=5)
    engine = Engine(ours, EngineConfig(max_num_seqs=1, return_routed_experts=True))
    params = SamplingParams(max_tokens=9, temperature=0.0, ignore_eos=True)
    engine.add(EngineRequest(request_id="a", prompt=tuple(PROMPTS[0]), params=params))
    tokens, end = [*PROMPTS[0]], None
    while engine.has_work:
        for end in engine.step():
            tokens += end.tokens
        if len(tokens) == 20:
            engine.update_weights(new.state_dict(), running="recompute")
    read = torch.tensor(tokens[:-1])
    with torch.no_grad():
        output = new(read, layout=SequenceLayout.packed([len(read)]), head=lambda output: output)
    for layer, expected in enumerate(output.routes.backbone):
        found = end.routed_experts[:, layer].long().sort(-1).values
        assert torch.equal(found, expected.sort(-1).values)


def test_without_the_option_nothing_is_returned():
    answer = LLM(tiny_model(CONFIG)).generate([PROMPTS[0]], SamplingParams(max_tokens=3))[0]
    assert answer.outputs[0].routed_experts is None


def test_a_model_without_mixtures_has_none_to_return():
    config = EngineConfig(return_routed_experts=True)
    answer = LLM(tiny_model("M*-"), config=config).generate([[1, 2]], SamplingParams(max_tokens=3))
    assert answer[0].outputs[0].routed_experts is None
