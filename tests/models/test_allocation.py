"""Memory for models that were described without any."""

import copy

import torch
from torch import nn

from nemotron3.models.allocation import allocate
from nemotron3.models.initial_values import Constant
from nemotron3.models.parameter import DeclaredModule


class _Mixer(DeclaredModule):
    """Parameters whose sizes do not fit lines of the cache, and one that stays in float32."""

    def __init__(self):
        super().__init__()
        self.odd = nn.Linear(3, 5)
        self.declare("slopes", (7,), init=Constant(1.0), decays=False, keep_float32=True)
        self.declare("gains", (7,), init=Constant(1.0), decays=False)
        self.declare_buffer("bias", (1,), init=Constant(0.0), keep_float32=True)


def _allocated(dtype):
    with torch.device("meta"):
        model = nn.Sequential(_Mixer(), nn.Linear(2, 2, bias=False), _Mixer())
    allocate(model, torch.device("cpu"), dtype)
    return model


def test_tensors_have_memory_of_their_own():
    model = _allocated(torch.bfloat16)
    tensors = [*model.parameters(), *model.buffers()]
    with torch.no_grad():
        for number, tensor in enumerate(tensors, start=1):
            assert not tensor.is_meta
            assert tensor.data_ptr() % 64 == 0
            tensor.fill_(number)
    for number, tensor in enumerate(tensors, start=1):
        assert (tensor == number).all()


def test_some_stay_in_float32():
    model = _allocated(torch.bfloat16)
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        wanted = torch.float32 if name.endswith(("slopes", "2.bias", "0.bias")) else torch.bfloat16
        assert tensor.dtype == wanted, name


def test_memory_outlives_the_model_and_copies_are_apart():
    weight = _allocated(torch.float32)[1].weight
    other = copy.deepcopy(weight)
    with torch.no_grad():
        weight.fill_(2.0)
        other.fill_(3.0)
    assert (weight == 2.0).all()
    assert weight.untyped_storage().nbytes() == 16


def test_a_model_without_parameters_needs_none():
    model = nn.ReLU()
    allocate(model, torch.device("cpu"), torch.float32)
    assert not list(model.parameters())
