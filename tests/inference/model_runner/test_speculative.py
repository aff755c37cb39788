"""The draft block processes deferred inputs with the same result as immediate ones."""

import pytest
import torch

from nemotron3.inference.config import EngineConfig
from nemotron3.inference.engine import Engine
from nemotron3.inference.model_runner import speculative
from nemotron3.inference.model_runner.draft_length import DraftLength
from nemotron3.inference.requests import SamplingParams
from nemotron3.inference.sequences import EngineRequest
from nemotron3.models.layout import SequenceLayout
from tests.tiny import tiny_config, tiny_model, tokens_for
from tests.tolerances import DECODE

CONFIG = tiny_config("MEM*E/*E/*E", eos_token_id=2)
OF_TWO = {7: 100.0, 9: 100.0}
"""With a choice of two tokens, half of the drafts of a model that was never trained stand."""
LENGTH = 24


class Scheduled(DraftLength):
    """Drafts as many tokens as a list says, then two."""

    def __init__(self, counts):
        super().__init__(2, adapts=False)
        self._counts = iter(counts)

    def choose(self, _):
        return next(self._counts, 2)


@pytest.fixture(scope="module")
def model():
    return tiny_model(CONFIG)


def engine_of(model, counts):
    config = EngineConfig(
        max_num_seqs=4, page_size=4, prefix_interval=8, max_model_len=128, max_draft_tokens=2
    )
    engine = Engine(model, config)
    engine._draft_length = Scheduled(counts)
    return engine


def drafts_of(engine, *prompts):
    """Answers, and the drafts of each by its length at the time."""
    params = SamplingParams(temperature=0.0, max_tokens=LENGTH, ignore_eos=True, logit_bias=OF_TWO)
    drafted = {}
    write = engine._drafter.write

    def listening(sequences, *rest):
        write(sequences, *rest)
        for sequence in sequences:
            drafted[sequence.request_id, sequence.num_generated] = list(sequence.drafts)

    engine._drafter.write = listening
    answers = {}
    for name, prompt in enumerate(prompts):
        engine.add(EngineRequest(request_id=str(name), prompt=tuple(prompt), params=params))
    while engine.has_work:
        for delta in engine.step():
            answers.setdefault(delta.request_id, []).extend(delta.tokens)
    engine._drafter.write = write
    return answers, drafted


def assert_same_where_both(ours, theirs, *, at_least):
    both = ours.keys() & theirs.keys()
    assert len(both) >= at_least
    assert {place: ours[place] for place in both} == {place: theirs[place] for place in both}


@pytest.mark.parametrize("most", [3, 128])
@pytest.mark.parametrize("pauses", [[0] * 7, [2, 2, 0, 0, 0, 2, 0, 2, 0, 0]])
def test_drafts_after_a_pause_are_those_without_one(model, pauses, most, monkeypatch):
    monkeypatch.setattr(speculative, "_MOST_PENDING", most)
    prompts = [tokens_for(CONFIG, n, seed=n).tolist() for n in (17, 5)]
    answers, eager = drafts_of(engine_of(model, []), *prompts)
    late_answers, late = drafts_of(engine_of(model, pauses), *prompts)
    assert late_answers == answers
    assert_same_where_both(late, eager, at_least=6)


def test_an_answer_that_ends_in_a_pause_leaves_a_whole_state(model, assert_close):
    prompt = tokens_for(CONFIG, 17, seed=1).tolist()
    engine = engine_of(model, [0] * 2 * LENGTH)
    answers, drafted = drafts_of(engine, prompt)
    assert not drafted
    kept = engine.prefixes.match([*prompt, *answers["0"]])
    assert (kept.length, kept.drafts.length) == (len(prompt) + LENGTH - 1, len(prompt) - 1)
    # What follows the last one may change.
    assert kept.drafts.pending.tokens == tuple(answers["0"][:-1])
    read = torch.tensor([*prompt, *answers["0"]][: kept.length])
    with torch.no_grad():
        hidden = model.hidden_states(read, layout=SequenceLayout.of(read[None]))
    assert_close(kept.drafts.hidden, hidden[-1], DECODE)
    more = [*prompt, *answers["0"], 5, 6, 7]
    engine._draft_length = Scheduled([])
    again, with_prefix = drafts_of(engine, more)
    assert engine.stats().prefix_hits >= len(prompt) + LENGTH - 1
    expected, anew = drafts_of(engine_of(model, []), more)
    assert again == expected
    assert_same_where_both(with_prefix, anew, at_least=6)
