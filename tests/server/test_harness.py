"""A public harness measures a model through the server and finds what the model itself says.

The task is local: questions with two choices, and the harness's own way to score them.
"""

import json

import pytest
import torch

from nemotron3.models.nemotron_h import LanguageModel
from nemotron3.text import Tokenizer
from tests.local_tasks import LOCAL_CHOICES
from tests.server.serving import MODEL

QUESTIONS = [
    {"question": question, "choices": choices, "answer": i % 2}
    for i, (question, choices) in enumerate(
        [
            ("Is Paris there?", [" Paris", " Hello"]),
            ("Why?", [" true", " false"]),
            ("Hello", [" there", " city"]),
            ("Hello, why", [" city", " there?"]),
            ("The sky is", [" blue", " a parameter"]),
            ("2 + 2 =", [" 4", " 5"]),
        ]
    )
]


@torch.no_grad()
def own_scores(folder, question, choices):
    tokenizer = Tokenizer.from_directory(folder)
    model = LanguageModel.from_pretrained(folder)
    before = tokenizer.encode(question)
    scores = []
    for choice in choices:
        ids = tokenizer.encode(question + choice)
        logprobs = model(torch.tensor([ids])).log_softmax(-1)[0]
        scores.append(sum(logprobs[i - 1, ids[i]].item() for i in range(len(before), len(ids))))
    return scores


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
def test_the_harness_scores_what_the_model_says(served, model_folder, tmp_path, monkeypatch):
    import lm_eval.tasks  # noqa: PLC0415 - takes seconds, which other tests need not wait for

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("OPENAI_API_KEY", "none")
    data = tmp_path / "questions.jsonl"
    data.write_text("".join(json.dumps(each) + "\n" for each in QUESTIONS), encoding="utf-8")
    (tmp_path / "task.yaml").write_text(LOCAL_CHOICES.format(data=data), encoding="utf-8")
    found = lm_eval.simple_evaluate(
        model="local-completions",
        model_args={
            "model": MODEL,
            "base_url": f"{served.url}/v1/completions",
            "tokenizer": str(model_folder),
            "tokenizer_backend": "huggingface",
            "num_concurrent": 3,
        },
        tasks=["local_choices"],
        task_manager=lm_eval.tasks.TaskManager(include_path=str(tmp_path), include_defaults=False),
        log_samples=True,
        bootstrap_iters=0,
    )
    samples = found["samples"]["local_choices"]
    assert len(samples) == len(QUESTIONS)
    num_right = 0
    for sample in samples:
        doc = sample["doc"]
        expected = own_scores(model_folder, doc["question"], doc["choices"])
        scores = [float(answer[0]) for answer in sample["filtered_resps"]]
        assert scores == pytest.approx(expected, abs=1e-3)
        num_right += expected.index(max(expected)) == doc["answer"]
    assert found["results"]["local_choices"]["acc,none"] == pytest.approx(num_right / 6)
