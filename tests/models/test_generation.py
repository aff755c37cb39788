"""Writing text: greedy, sampled, stopped, and reproducible."""

import pytest
import torch

from nemotron3.errors import ConfigError
from nemotron3.models.generation import GenerationConfig, sample
from nemotron3.models.steps import StepRunner
from tests.tiny import tiny_config, tiny_model, tokens_for

GREEDY = GenerationConfig(max_new_tokens=9, temperature=0.0)


@pytest.fixture(scope="module")
def model():
    return tiny_model(tiny_config("MEM*E", eos_token_id=0))


@pytest.fixture(scope="module")
def prompts(model):
    return [tokens_for(model.config, n, seed=n).tolist() for n in (5, 1, 12)]


@torch.no_grad()
def test_greedy_is_the_argmax_of_the_full_pass(model, prompts):
    for prompt, new in zip(prompts, model.generate(prompts, GREEDY), strict=True):
        logits = model(torch.tensor([prompt + new]))[0]
        assert new == logits[len(prompt) - 1 : -1].argmax(-1).tolist()


def test_company_in_the_batch_changes_nothing_for_greedy(model, prompts):
    together = model.generate(prompts, GREEDY)
    assert together == [model.generate([prompt], GREEDY)[0] for prompt in prompts]


def test_a_finished_prompt_leaves_the_batch_and_the_others_go_on(model, prompts, monkeypatch):
    plain = model.generate(prompts, GREEDY)
    stop = plain[0][2]
    rows = []
    run = StepRunner.run
    monkeypatch.setattr(
        StepRunner,
        "run",
        lambda self, tokens, slots: rows.append(len(slots)) or run(self, tokens, slots),
    )
    config = GenerationConfig(max_new_tokens=9, temperature=0.0, stop_token_ids=(stop,))
    stopped = model.generate(prompts, config)
    for full, short in zip(plain, stopped, strict=True):
        assert short == (full[: full.index(stop)] if stop in full else full)
    assert rows[0] == 3
    assert rows == sorted(rows, reverse=True)
    assert rows[-1] < 3


def test_tokens_are_shown_as_they_come(model, prompts):
    shown = []
    results = model.generate(prompts, GREEDY, on_token=lambda i, token: shown.append((i, token)))
    assert [i for i, _ in shown[:3]] == [0, 1, 2]
    for index, tokens in enumerate(results):
        assert [token for i, token in shown if i == index] == tokens


def test_the_end_of_sequence_stops_by_default(model, prompts):
    endless = model.generate(prompts[:1], GenerationConfig())[0]
    assert len(endless) == GenerationConfig().max_new_tokens
    ending = tiny_model(tiny_config("MEM*E", eos_token_id=endless[5]))
    assert ending.generate(prompts[:1]) == [endless[: endless.index(endless[5])]]


def test_sampling_is_decided_by_its_seed(model, prompts):
    def write(seed):
        return model.generate(prompts, GenerationConfig(max_new_tokens=12, seed=seed))

    torch.manual_seed(1)
    first = write(7)
    torch.manual_seed(2)
    assert write(7) == first
    assert write(8) != first


PROBABILITIES = torch.tensor([0.4, 0.3, 0.2, 0.1])


def frequencies(**choice):
    config = GenerationConfig(**choice)
    generator = torch.Generator().manual_seed(0)
    drawn = sample(PROBABILITIES.log().expand(20_000, 4), config, generator)
    return torch.bincount(drawn, minlength=4) / len(drawn)


@pytest.mark.parametrize(
    ("choice", "expected"),
    [
        ({}, [0.4, 0.3, 0.2, 0.1]),
        ({"temperature": 0.0}, [1.0, 0, 0, 0]),
        ({"temperature": 0.5}, [16 / 30, 9 / 30, 4 / 30, 1 / 30]),
        ({"top_k": 2}, [4 / 7, 3 / 7, 0, 0]),
        ({"top_k": 9}, [0.4, 0.3, 0.2, 0.1]),
        ({"top_p": 0.35}, [1.0, 0, 0, 0]),
        ({"top_p": 0.65}, [4 / 7, 3 / 7, 0, 0]),
        ({"top_p": 0.75}, [4 / 9, 3 / 9, 2 / 9, 0]),
        ({"top_p": 0.75, "top_k": 2}, [4 / 7, 3 / 7, 0, 0]),
        ({"top_p": 0.999}, [0.4, 0.3, 0.2, 0.1]),
    ],
)
def test_sampling_follows_the_shaped_distribution(choice, expected):
    assert torch.allclose(frequencies(**choice), torch.tensor(expected), atol=0.015)


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        ({"max_new_tokens": 0}, "at least one token"),
        ({"temperature": -0.1}, "temperature is -0.1"),
        ({"top_p": 0.0}, "top_p is 0.0"),
        ({"top_p": 1.5}, "top_p is 1.5"),
        ({"top_k": -1}, "top_k is -1"),
    ],
)
def test_a_choice_that_makes_no_sense_is_refused(choice, message):
    with pytest.raises(ConfigError, match=message):
        GenerationConfig(**choice)


@pytest.mark.parametrize("prompts", [[], [[1, 2], []]])
def test_an_empty_prompt_cannot_be_continued(model, prompts):
    with pytest.raises(ConfigError, match="at least one token"):
        model.generate(prompts)
