"""Tasks of lm-evaluation-harness in this process, held to the model's own probabilities."""

import json
import sys
from types import SimpleNamespace

import pytest
import torch

from nemotron3.errors import ConfigError, DependencyMissingError
from nemotron3.inference.config import EngineConfig
from nemotron3.inference.llm import LLM
from nemotron3.models.nemotron_h import LanguageModel
from nemotron3.text import Tokenizer
from tests.local_tasks import LOCAL_CHOICES
from tests.rl.playground import save_policy

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("default")]

CHOICES = [
    {"question": "say 3", "choices": [" up", " down"], "answer": 0},
    {"question": "say 4 and", "choices": [" down", " up and down"], "answer": 1},
    {"question": "user", "choices": [" say", " 8"], "answer": 1},
]
TASKS = {
    "local_choices": LOCAL_CHOICES,
    "local_answers": """
task: local_answers
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{choices[answer]}}}}"
generation_kwargs: {{until: ["\\n"], max_gen_toks: 5, do_sample: false}}
metric_list: [{{metric: exact_match}}]
""",
    "local_text": """
task: local_text
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{question}}}}"
metric_list: [{{metric: bits_per_byte}}]
""",
}


@pytest.fixture(scope="module")
def harness():
    return pytest.importorskip("nemotron3.evaluation.harness")


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    return save_policy(tmp_path_factory.mktemp("policy") / "model")


@pytest.fixture
def tasks(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    data = tmp_path / "questions.jsonl"
    data.write_text("".join(json.dumps(each) + "\n" for each in CHOICES), encoding="utf-8")
    folder = tmp_path / "tasks"
    folder.mkdir()
    for name, text in TASKS.items():
        (folder / f"{name}.yaml").write_text(text.format(data=data), encoding="utf-8")
    return folder


def llm_of(policy, **changes):
    config = EngineConfig(
        **({"max_num_seqs": 4, "max_model_len": 64, "max_draft_tokens": 0} | changes)
    )
    return LLM(policy, config=config)


def requests(*arguments):
    return [SimpleNamespace(args=each) for each in arguments]


@torch.no_grad()
def own_logprob(policy, context_ids, ids):
    model = LanguageModel.from_pretrained(policy)
    logprobs = model(torch.tensor([context_ids + ids])).log_softmax(-1)[0]
    rows = logprobs[len(context_ids) - 1 : -1]
    total = sum(rows[i, token].item() for i, token in enumerate(ids))
    return total, rows.argmax(-1).tolist() == ids


def test_log_likelihoods_are_the_models_own(harness, policy):
    tokenizer = Tokenizer.from_directory(policy)
    pairs = [
        ("say 3", " up"),
        ("", "say"),
        ("user say ", "8 down"),
        ("say", " 4 up and say 5 down"),
    ]
    found = harness.HarnessModel(llm_of(policy)).loglikelihood(requests(*pairs))
    for (context, continuation), (score, is_greedy) in zip(pairs, found, strict=True):
        before = tokenizer.encode(context.rstrip()) or [tokenizer.eos_id]
        whole = tokenizer.encode(context + continuation)
        ids = whole[len(before) :] if context else whole
        assert (score, is_greedy) == (
            pytest.approx(own_logprob(policy, before, ids)[0], abs=1e-4),
            own_logprob(policy, before, ids)[1],
        )


def test_the_most_probable_continuation_is_greedy(harness, policy):
    llm = llm_of(policy)
    tokenizer = Tokenizer.from_directory(policy)
    [answer] = harness.HarnessModel(llm).generate_until(
        requests(("say 3", {"max_gen_toks": 1, "until": []}))
    )
    [(_, is_greedy)] = harness.HarnessModel(llm)._loglikelihood_tokens(
        [(None, tokenizer.encode("say 3"), tokenizer.encode(answer))]
    )
    assert is_greedy == (len(tokenizer.encode(answer)) == 1)


def test_a_text_longer_than_the_context_is_read_in_windows(harness, policy):
    tokenizer = Tokenizer.from_directory(policy)
    text = "say 3 up and say 4 down " * 6
    ids = tokenizer.encode(text)
    model = harness.HarnessModel(llm_of(policy, max_model_len=18))
    [found] = model.loglikelihood_rolling(requests((text,)))
    assert len(ids) > 40
    expected, stream = 0.0, [tokenizer.eos_id, *ids]
    for start in range(0, len(ids), 16):  # the last window is filled with what was before it
        end = min(start + 16, len(ids))
        context, window = stream[end - 16 : start + 1], stream[start + 1 : end + 1]
        expected += own_logprob(policy, context, window)[0]
    assert found == pytest.approx(expected, abs=1e-3)
    [whole] = harness.HarnessModel(llm_of(policy)).loglikelihood_rolling(requests(("say 3 up",)))
    start = [tokenizer.eos_id]
    assert whole == pytest.approx(
        own_logprob(policy, start, tokenizer.encode("say 3 up"))[0], abs=1e-4
    )


def test_answers_end_where_a_task_says(harness, policy):
    model = harness.HarnessModel(llm_of(policy))
    [free] = model.generate_until(requests(("say 3", {"max_gen_toks": 20})))
    mark = free[len(free) // 2]
    [cut] = model.generate_until(requests(("say 3", {"max_gen_toks": 20, "until": mark})))
    assert cut == free[: free.index(mark)]
    sampled = {"max_gen_toks": 20, "do_sample": True, "temperature": 1.0}
    assert model.generate_until(requests(("say 3", sampled))) != [free]
    with pytest.raises(ConfigError, match="answers of 64 tokens"):
        model.generate_until(requests(("say", {"max_gen_toks": 64})))


def test_local_tasks_are_scored(harness, policy, tasks):
    names = list(TASKS)
    found = harness.evaluate_tasks(llm_of(policy), names, include_path=tasks)
    tokenizer = Tokenizer.from_directory(policy)
    right = {}
    for place, doc in enumerate(CHOICES):
        before = tokenizer.encode(doc["question"])
        scores = [
            own_logprob(policy, before, tokenizer.encode(doc["question"] + c)[len(before) :])[0]
            for c in doc["choices"]
        ]
        right[place] = float(scores.index(max(scores)) == doc["answer"])
    choices = found["local_choices"]
    assert choices.metrics["acc,none"] == pytest.approx(sum(right.values()) / 3)
    assert sorted(choices.samples["acc,none"].values()) == sorted(right.values())
    assert found["local_answers"].metrics["exact_match,none"] in (0.0, 1 / 3, 2 / 3, 1.0)
    assert found["local_text"].metrics["bits_per_byte,none"] > 0
    assert found["local_text"].samples == {}  # less is better there: no rewards
    few = harness.evaluate_tasks(llm_of(policy), ["local_choices"], include_path=tasks, limit=2)
    assert len(few["local_choices"].samples["acc,none"]) == 2


def test_unknown_tasks_and_folders_are_refused(harness, tasks):
    with pytest.raises(ConfigError, match="no task 'local_chioces' in lm-evaluation-harness or"):
        harness.check_tasks(["local_chioces"], tasks)
    with pytest.raises(ConfigError, match="is no folder"):
        harness.check_tasks(["local_choices"], tasks / "missing")


def test_without_the_package_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.delitem(sys.modules, "nemotron3.evaluation.harness", raising=False)
    with pytest.raises(DependencyMissingError, match=r"pip install 'nemotron3\[evaluation\]'"):
        __import__("nemotron3.evaluation.harness")
