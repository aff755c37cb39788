"""The benchmark of reinforcement learning beside its peers, at toy size and without TRL."""

import json
import sys
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from benchmarks.models import load_theirs
from benchmarks.rl_peers import DENSE, EVEN, OURS, PEERS, ROLLOUTS, SAME, UPDATE, Turn, as_figure
from benchmarks.rl_peers_worker import EndsAt, Judge, answered, dense_model

from benchmarks import machine, page, rl_peers, timing
from nemotron3.environments.letter_counting import LetterCounting
from nemotron3.models.config import ModelConfig
from nemotron3.models.costs import model_costs
from nemotron3.text import Tokenizer
from tests.rl.playground import save_policy


@pytest.fixture
def _at_once(monkeypatch):
    monkeypatch.setattr(rl_peers, "PAUSE_S", 0.0)
    monkeypatch.setattr(timing, "PAUSE_S", 0.0)
    monkeypatch.setattr(rl_peers, "AT_ONCE", 8)


class Here(rl_peers.Worker):
    """A peer in this process, which starts at once."""

    parameters = 1

    def __init__(self, folder, dense=None):
        self._folder = folder
        self._model = load_theirs(folder) if dense is None else dense_model(dense)

    def ask(self, what, **fields):
        return json.loads(json.dumps(answered({"do": what, **fields}, self._model, self._folder)))


@pytest.mark.long
@pytest.mark.usefixtures("_at_once")
def test_rollouts_are_compared_where_the_programs_agree(tmp_path, capsys, monkeypatch):
    model = save_policy(tmp_path / "model")

    def workers(_, folder, dense):
        return nullcontext({n: Here(folder, None if n == SAME else dense) for n in PEERS})

    monkeypatch.setattr(rl_peers, "workers", workers)
    (model / "generation_config.json").write_text('{"eos_token_id": [2, 11]}')
    command = [str(model), "--rounds", "1", "--threads", "1", "--out", str(tmp_path)]
    rl_peers.main(command, environments=("letter_counting", "calculator"))
    (written,) = tmp_path.glob("rl_peers-*.json")
    result = json.loads(written.read_text())
    assert result["differences"]["logprobs"] < 1e-5
    assert result["differences"]["rewards"] == 0
    (figure,) = result["figures"]
    assert figure["name"] == ROLLOUTS
    assert figure["tokens"][EVEN] == 8 * result["mean_length"]
    assert figure["tokens"][DENSE] == pytest.approx(figure["tokens"][EVEN], rel=0.2)
    assert 0 < figure["tokens"][SAME] <= 8 * 48
    assert figure["ratio"].keys() == {SAME, DENSE, EVEN}
    assert "updates are left out" in capsys.readouterr().out
    text = page.render(page.PAGE.read_text(encoding="utf-8"), tmp_path)
    assert "| rollouts, 8 at once, tokens/s |" in text


@pytest.mark.slow
def test_a_peer_that_ends_leaves_its_last_words(tmp_path):
    worker = rl_peers.Worker(Path(sys.executable), tmp_path / "nothing", tmp_path / "log")
    with pytest.raises(SystemExit, match=r"a peer has ended.*(?s:.)*nothing"):
        worker.await_model()
    worker.close()


class Certain:
    """A double for a peer that finds every token certain."""

    parameters = 1

    def ask(self, what, *, answers, **_):
        if what == "logprobs":
            return {"logprobs": [[0.0] * len(answer) for answer in answers]}
        return {"rewards": [0.0] * len(answers)}


@pytest.mark.usefixtures("_at_once")
def test_nothing_is_timed_while_the_programs_disagree(tmp_path, capsys, monkeypatch):
    model = save_policy(tmp_path / "model")
    peers = nullcontext(dict.fromkeys(PEERS, Certain()))
    monkeypatch.setattr(rl_peers, "workers", lambda *_: peers)
    result = rl_peers.measure(model, ("letter_counting",), trl_python=None, rounds=1)
    assert result["figures"] == []
    assert result["differences"]["logprobs"] > 1.0
    assert "NOT COMPARED" in capsys.readouterr().out


@pytest.mark.usefixtures("_at_once")
def test_an_update_is_made_of_every_answer(tmp_path):
    model = save_policy(tmp_path / "model")
    ours = rl_peers.Ours(model, ("letter_counting",), at_once=8)
    before = ours.model.lm_head.weight.detach().clone()
    turn = ours.update(ours.tasks(1, seed=0), seed=0)
    assert 8 <= turn.tokens <= 8 * 48
    assert turn.seconds > 0
    assert (ours.model.lm_head.weight - before).abs().max() < 1e-6


def test_the_peers_judge_wants_a_right_answer_that_has_ended(tmp_path):
    folder = save_policy(tmp_path / "model")
    environment, tokenizer = LetterCounting(difficulty=0.0), Tokenizer.from_directory(folder)
    row = environment.task(0)
    (turn,) = environment.solve(row)
    right, wrong = (
        [*tokenizer.encode("one by one"), tokenizer.think_end_id, *tokenizer.encode(said), 11]
        for said in (turn.content, turn.content + "7")
    )
    judge = Judge(folder, [2, 11])
    assert judge.rewards([right, wrong, right[:-1]], [row] * 3) == [1.0, 0.0, 0.0]


def test_every_answer_ends_at_its_own_length():
    ends = EndsAt(3, [1, 2, 2], [5, 2])
    drawn = torch.zeros(3, 3 + 2, dtype=torch.int64)
    for step in range(2):
        scores = ends(drawn[:, : 3 + step], torch.zeros(3, 7))
        drawn[:, 3 + step] = scores.argmax(-1)
        assert torch.equal(scores.isfinite().sum(-1) == 1, ends._lengths == step + 1)
    assert [row.index(5) - 2 for row in drawn.tolist()] == [1, 2, 2]


def test_lengths_are_distributed_as_those_of_rollouts():
    rollouts = [SimpleNamespace(num_sampled=n) for n in (*range(1, 129), *[48] * 128)]
    found = rl_peers.same_lengths(rollouts)
    assert len(found) == rl_peers.AT_ONCE
    assert sum(found) / len(found) == pytest.approx((64.5 + 48) / 2, rel=0.02)
    assert max(found) > 120


@pytest.mark.skipif(sys.platform != "linux", reason="the system says it in /proc")
def test_own_work_is_not_that_of_others(monkeypatch):
    busy, own = [100.0], [10.0]
    monkeypatch.setattr(machine, "_busy_seconds", lambda: busy[0])
    monkeypatch.setattr(machine, "_own_seconds", lambda: own[0])
    monkeypatch.setattr(machine.os, "cpu_count", lambda: 2)
    monkeypatch.setattr(machine.time, "perf_counter", lambda: busy[0])
    others = machine.OtherPrograms()
    busy[0], own[0] = 110.0, 20.0
    assert others.share() == 0.0
    own[0] = 15.0
    assert others.share() == 0.25
    monkeypatch.undo()
    assert machine._busy_seconds() > machine._own_seconds() > 0


def test_a_ratio_above_one_says_that_ours_is_faster():
    found = {OURS: [Turn(1.0, 30), Turn(2.0, 60)], SAME: [Turn(2.0, 20), Turn(4.0, 40)]}
    assert as_figure(ROLLOUTS, found)["ratio"] == {SAME: 3.0}
    assert as_figure(UPDATE, found)["ratio"] == {SAME: 2.0}
    assert as_figure(UPDATE, found)["interval"] == {SAME: (2.0, 2.0)}


@pytest.mark.slow  # transformers takes seconds to import
def test_the_dense_peer_has_the_active_parameters_of_the_model():
    transformers = pytest.importorskip("transformers")
    config = ModelConfig.preset("tiny")
    dimensions = rl_peers.dense_dimensions(config)
    model = transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**dimensions))
    embedding = model.get_input_embeddings().weight.numel()
    active = sum(p.numel() for p in model.parameters()) - embedding
    assert active == pytest.approx(model_costs(config).total_active, rel=2e-3)
