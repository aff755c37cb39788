"""Megatron-core as an oracle: its formulas, called on the CPU as they stand.

It imports without a GPU but not without warnings, and one of its functions talks to the process
group of a training job, for which `alone` stands in.
"""

import warnings

import pytest
import torch
from torch import Tensor

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    pytest.importorskip("megatron.core", exc_type=ImportError)
    from megatron.core.packed_seq_params import PackedSeqParams
    from megatron.core.transformer.moe import moe_utils
    from megatron.core.transformer.multi_token_prediction import roll_tensor


def sequence_balance(logits: Tensor, *, choices: int, factor: float) -> Tensor:
    """`seq_aux_loss` of [seq, batch, expert] logits, as `TopKRouter` puts its parts together."""
    length, batch, experts = logits.shape
    chosen, scores = moe_utils.compute_routing_scores_for_aux_loss(
        logits.reshape(-1, experts), choices, "sigmoid"
    )
    chosen, scores = chosen.reshape(length, -1), scores.reshape(length, -1)
    summed = moe_utils.switch_load_balancing_loss_func(
        probs=scores,
        tokens_per_expert=chosen.sum(0),
        total_num_tokens=length,
        topk=choices,
        num_experts=experts,
        moe_aux_loss_coeff=factor,
    )
    return summed / batch


def updated_bias(
    bias: Tensor, load: Tensor, rate: float, monkeypatch: pytest.MonkeyPatch
) -> Tensor:
    """The selection bias after a batch, on a single rank."""
    alone(monkeypatch)
    return moe_utils.get_updated_expert_bias(load.clone(), bias, rate)


def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """A job of one process: sums over all ranks are what each of them has."""
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda tensor, **_: tensor)
    monkeypatch.setattr(
        moe_utils.parallel_state, "get_tensor_and_data_parallel_group", lambda **_: None
    )


def rolled(values: Tensor, lengths: tuple[int, ...], times: int) -> Tensor:
    """A packed stream shifted left inside its documents, so often."""
    bounds = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    packed = PackedSeqParams(qkv_format="thd", cu_seqlens_q=bounds, cu_seqlens_kv=bounds)
    for _ in range(times):
        values, _ = roll_tensor(values[None], dims=-1, packed_seq_params=packed)
        values = values[0]
    return values


def rolled_rows(values: Tensor, times: int) -> Tensor:
    """[batch, seq] shifted left along each row, so often."""
    for _ in range(times):
        values, _ = roll_tensor(values.clone(), dims=-1)
    return values
