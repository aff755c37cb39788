"""A model sharded over processes trains as the whole one does: the forward pass is its own call."""

import json
import multiprocessing
from pathlib import Path

import pytest
import torch
from torch import Tensor, distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard

from nemotron3.models.nemotron_h import LanguageModel
from nemotron3.training.objective import Objective
from nemotron3.training.optimizers import AdamWConfig, build_optimizer
from nemotron3.training.step import TrainingStep
from nemotron3.training.token_objective import TokenLossConfig, TokenObjective
from tests.tiny import tiny_config
from tests.tolerances import FLOAT32
from tests.training.batches import documents, pack, pretraining

RANKS, STEPS = 2, 4
MODELS = {
    "plain": tiny_config("ME*-E/*E/*E"),
    "tied": tiny_config("ME*E/*E", tie_word_embeddings=True),
}
CASES = [("plain", "pretrain", False), ("plain", "tokens", True), ("tied", "pretrain", False)]
LENGTHS = (9, 4, 17, 1, 6, 2, 12, 5)


def objective_of(kind: str, model: LanguageModel) -> Objective:
    if kind == "pretrain":
        return pretraining(model, balance_loss=0.1)
    config = TokenLossConfig(normalisation="sequence", mtp_loss_scaling=0.3)
    return TokenObjective(config, num_mtp_depths=model.config.pattern.num_mtp_depths)


def train(
    model: LanguageModel, kind: str, *, rank: int, ranks: int, recompute: bool
) -> list[dict[str, float]]:
    """The metrics of a few updates; every rank has its part of the documents of each."""
    optimizer = build_optimizer(model, AdamWConfig(lr=1e-2))
    step = TrainingStep(
        model,
        optimizer,
        objective_of(kind, model),
        clip_grad_norm=1.0,
        recompute=recompute,
        sum_over_ranks=_all_reduced if ranks > 1 else None,
    )
    history = []
    for number in range(STEPS):
        parts = documents(*LENGTHS, seed=number)[rank::ranks]
        batches = [pack(parts[:1]), pack(parts[1:])]
        history.append(step(batches, learning_rate=1e-2, measure=number == 1))
    return history


def _all_reduced(values: Tensor) -> Tensor:
    distributed.all_reduce(values)
    return values


def sharded(folder: Path, rank: int) -> None:
    """What each process does, case after case."""
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=RANKS
    )
    mesh = init_device_mesh("cpu", (RANKS,))
    found = []
    for name, kind, recompute in CASES:
        model = LanguageModel.from_config(MODELS[name], seed=3)
        for block in (*model.backbone.layers, *model.mtp.layers):
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.set_gradient_divide_factor(1.0)
                module.set_force_sum_reduction_for_comms(enable=True)  # gloo cannot scale
        found.append(train(model, kind, rank=rank, ranks=RANKS, recompute=recompute))
    (folder / f"rank-{rank}.json").write_text(json.dumps(found))
    distributed.destroy_process_group()


@pytest.fixture(scope="module")
def by_rank(tmp_path_factory):
    """The metrics of every case, from each of two processes."""
    folder = tmp_path_factory.mktemp("ranks")
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=sharded, args=(folder, rank)) for rank in range(RANKS)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=240)
    codes = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
    assert codes == [0, 0]
    return [json.loads((folder / f"rank-{rank}.json").read_text()) for rank in range(RANKS)]


@pytest.mark.slow
@pytest.mark.parametrize("case", range(len(CASES)), ids=["-".join(map(str, c)) for c in CASES])
def test_two_processes_train_as_one(by_rank, case):
    name, kind, _ = CASES[case]
    one, other = (found[case] for found in by_rank)
    assert one == other
    model = LanguageModel.from_config(MODELS[name], seed=3)
    wanted = train(model, kind, rank=0, ranks=1, recompute=False)
    assert wanted[-1]["train/loss"] != wanted[0]["train/loss"]
    for found, expected in zip(one, wanted, strict=True):
        assert found.keys() == expected.keys()
        for metric in found:
            if metric.startswith("train/") or metric == "optim/grad_norm":
                close = pytest.approx(expected[metric], rel=FLOAT32, abs=1e-5)
                assert found[metric] == close, metric
            if metric.startswith("moe/"):
                assert found[metric] == expected[metric], metric
