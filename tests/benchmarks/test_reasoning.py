"""The measurements of reasoning and of drafts count what they say; no figure is judged here."""

import random
from xml.etree import ElementTree

import pytest
from benchmarks.speculation import (
    Outcome,
    as_markdown,
    gains_of,
    measure,
    our_engines,
    params_for,
    prompts_of,
    records,
)
from examples.sums import TEMPLATE, VOCABULARY, problem, write_corpus

from benchmarks import budget, lookback, reasoner
from nemotron3 import LLM, LanguageModel, SamplingParams
from nemotron3.config import write_run
from nemotron3.text import Tokenizer
from tests.small_run import small_run, tiny_config


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A run's folder with a model that has learned nothing, and its corpus of sums."""
    folder = tmp_path_factory.mktemp("run")
    corpus = write_corpus(folder / "corpus", conversations=300)
    config = tiny_config("MEM*E/*E/*E", vocab_size=VOCABULARY)
    write_run(folder, small_run(folder, corpus=corpus, model=config))
    LanguageModel.from_config(config, seed=0).save_pretrained(folder / "model")
    Tokenizer.from_directory(folder / "corpus" / "tokenizer").save(folder / "model")
    return folder / "model"


def test_budget_holds_every_answer_to_its_limit(model, tmp_path):
    draw = random.Random(0)
    problems = [problem(draw, held_out=True) for _ in range(3)]
    points = budget.measure(LLM(model), problems, max_tokens=80)
    for point in points:
        if point.budget is not None:
            # Of its own, and the line end of the closing sequence.
            assert point.most_reasoning_tokens <= point.budget + point.grace + 1
    ways = [point.name for point in points if point.grace == 0]
    assert ways == [*(f"budget {b}" for b in budget.BUDGETS[:-1]), "no limit", *ways[-2:]]
    assert ways[-2:] == ["low effort", "no thinking"]
    budget.draw(points, tmp_path / "drawing.svg")
    assert ElementTree.parse(tmp_path / "drawing.svg").getroot().tag.endswith("svg")


def test_an_answer_counts_when_it_is_the_sum(model):
    llm = LLM(model)
    problems = [[1, 2], [3, 4]]
    answers = budget.ask(llm, problems, SamplingParams(max_tokens=4))
    scored = budget.point("any", problems, answers)
    right = [a.content.strip() == str(sum(p)) for a, p in zip(answers, problems, strict=True)]
    assert scored.accuracy == sum(right) / 2


def test_places_are_counted_as_far_as_drafts_stood():
    outcome = Outcome(name="3", seconds=1.0)
    for gain in (1, 4, 2):  # none, all three, the first
        outcome.count(gain, 3)
    assert (outcome.tried, outcome.stood) == ([3, 2, 1], [2, 1, 1])
    record = outcome.record(outcome)
    assert record["acceptance"] == [2 / 3, 1 / 2, 1.0]
    assert record["tokens_per_step"] == 7 / 3


def test_steps_of_a_told_answer_end_where_the_count_of_drafts_changes():
    def event(drafted, *tokens):
        return {"tokens": list(tokens), "timings": {"draft_n": drafted} if drafted else {}}

    told = [event(0, 5), event(3, 6), event(3, 7), event(6, 8), event(9, 9), event(9, 1), event(9)]
    assert gains_of(told) == [1, 2, 1, 2]
    assert gains_of([event(0, 5), event(0, 6), event(0)]) == [1, 1]  # without drafts


def test_drafts_change_no_answer(model):
    prompts = prompts_of(model, 3)
    template = TEMPLATE.render([{"role": "user", "content": ""}]).text
    tokenizer = Tokenizer.from_directory(model)
    for prompt in prompts:
        said = tokenizer.decode(prompt)
        assert said.startswith(template.split("user\n")[0])
        assert "<think>" in said[-9:]
    engines = our_engines(model, params_for(model, temperature=0, max_tokens=12))
    measure(engines, prompts, rounds=2)
    results = records(engines)
    assert [len(engine.outcome.answers) for engine in engines] == [6] * len(engines)
    assert list(results) == ["0", "1", "2", "3", "4", "up to 3"]
    assert not any(each["differing_answers"] for each in results.values())
    assert [len(each["acceptance"]) for each in results.values()] == [0, 1, 2, 3, 4, 0]
    machine = dict.fromkeys(("commit", "cpu", "threads", "torch"), "")
    machine |= {"load_before": 0, "load_after": 0}
    result = {"model": "m", "command": "", "date": "", "prompts": 3, "temperature": 0}
    text = as_markdown(result | {"ours": results, "llama_cpp": {}, "machine": machine})
    assert text.count("\n| ") == 1 + 1 + len(results)


def test_first_drafts_are_the_same_whatever_later_ones_look_back_at(model):
    acceptance = lookback.measure(model, rows=2, length=40)
    assert list(acceptance) == ["own", "append", "overwrite", "behind"]
    assert len({each[0] for each in acceptance.values()}) == 1


def test_the_larger_reasoner_is_the_examples_run_at_other_widths(tmp_path):
    corpus = write_corpus(tmp_path / "corpus", conversations=20)
    base = reasoner.example.recipe(corpus, steps=7)
    run = reasoner.run_of("toy", base)
    assert (run.name, run.corpus, run.training.steps) == ("reasoner-toy", corpus, 7)
    assert run.model.pattern.num_mtp_depths == 2
    assert run.model.hidden_size == 64
    assert run.model.vocab_size == VOCABULARY
