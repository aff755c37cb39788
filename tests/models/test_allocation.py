"""Memory for models that were described without any."""

import copy
import os
import platform
import subprocess
import sys

import pytest
import torch
from torch import nn

from nemotron3.models.allocation import ALWAYS_FLOAT32, allocate


class _Mixer(nn.Module):
    """Parameters whose sizes do not fit lines of the cache, and one that stays in float32."""

    def __init__(self):
        super().__init__()
        self.odd = nn.Linear(3, 5)
        self.A_log = nn.Parameter(torch.empty(7))
        self.register_buffer("e_score_correction_bias", torch.empty(1))


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
        wanted = torch.float32 if name.split(".")[-1] in ALWAYS_FLOAT32 else torch.bfloat16
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


FAULTS = """
import resource, sys
import torch
from nemotron3.models.allocation import keep_freed_memory

kept = keep_freed_memory() if "keep" in sys.argv else None

def fill():
    torch.empty(10 * 2**20).fill_(1.0)

def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

def work():
    counts = []
    for _ in range(8):
        before = faults()
        fill()
        counts.append(faults() - before)
    print(kept, min(counts))

work()
"""


def faults(*arguments, **settings):
    """Whether memory is kept, and the fewest pages that were fetched for tensors of one size."""
    plain = {k: v for k, v in os.environ.items() if not k.startswith(("MALLOC_", "GLIBC_"))}
    command = [sys.executable, "-c", FAULTS, *arguments]
    run = subprocess.run(command, env=plain | settings, capture_output=True, text=True, check=True)
    kept, count = run.stdout.split()
    return kept, int(count)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries have no mallopt")
def test_memory_that_is_kept_is_not_fetched_again():
    assert faults()[1] > 10 * 2**20 * 4 // 2**16  # pages are no larger than 64 KiB
    kept, count = faults("keep")
    assert kept == "True"
    assert count < 100


def test_whoever_has_set_up_the_allocator_is_left_alone():
    assert faults("keep", MALLOC_ARENA_MAX="3")[0] == "False"
