"""The deltas of answers that nobody streams: fewer, with the same content."""

import pytest

from nemotron3.inference.config import EngineConfig
from nemotron3.inference.engine import Engine
from nemotron3.inference.requests import SamplingParams
from nemotron3.inference.sequences import EngineRequest
from tests.tiny import tiny_config, tiny_model, tokens_for

CONFIG = tiny_config("MEM*E/*E/*E", eos_token_id=2)


@pytest.fixture(scope="module")
def model():
    return tiny_model(CONFIG)


@pytest.mark.parametrize("running", ["recompute", "keep"])
@pytest.mark.parametrize("drafts", [0, 2])
def test_an_answer_that_nobody_streams_comes_in_few_deltas(model, running, drafts):
    """With the same tokens, log-probabilities and versions as one that is streamed."""
    params = SamplingParams(n=2, max_tokens=12, seed=3, logprobs=1, ignore_eos=True)
    found, sizes = {}, {}
    for is_streamed in (True, False):
        config = EngineConfig(max_num_seqs=4, max_draft_tokens=drafts, adapts_drafts=False)
        engine = Engine(model, config)
        for place, length in enumerate((3, 9, 17)):
            engine.add(
                EngineRequest(
                    request_id=str(place),
                    prompt=tuple(tokens_for(CONFIG, length, seed=length).tolist()),
                    params=params,
                    is_streamed=is_streamed,
                )
            )
        answers, step = {}, 0
        while engine.has_work:
            deltas = engine.abort("2") if step == 5 else engine.step()
            step += 1
            for delta in deltas:
                answers.setdefault((delta.request_id, delta.index), []).append(delta)
            if step == 3:
                engine.invalidate_caches(version=5, running=running)
        found[is_streamed] = {
            answer: (
                [token for delta in deltas for token in delta.tokens],
                [score for delta in deltas for score in delta.logprobs],
                [delta.weight_version for delta in deltas for _ in delta.tokens],
                any(delta.continues_old_states for delta in deltas),
                [delta.prompt is not None for delta in deltas].count(True),
                (deltas[-1].finish_reason, deltas[-1].num_drafted, deltas[-1].num_accepted),
            )
            for answer, deltas in answers.items()
        }
        sizes[is_streamed] = max(map(len, answers.values()))
    assert found[True] == found[False]
    assert {version for _, _, versions, *_ in found[False].values() for version in versions} == {
        0,
        5,
    }
    assert sizes[False] <= 3 < sizes[True]
