"""Which device a run uses, and what it says where there is none."""

import pytest
import torch

from nemotron3.errors import BackendUnavailableError, ConfigError
from nemotron3.runtime import devices
from nemotron3.runtime.devices import (
    describe_device,
    measure_product_rate,
    processor_model,
    resolve_device,
)


def test_the_cpu_is_always_there():
    assert resolve_device("cpu") == torch.device("cpu")


@pytest.mark.parametrize(("model", "words"), [("AMD EPYC", "AMD EPYC"), ("", "CPU")])
def test_the_processor_is_named(monkeypatch, model, words):
    monkeypatch.setattr(devices, "processor_model", lambda: model)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    assert describe_device(torch.device("cpu")) == f"{words}, 1 thread"
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    assert describe_device(torch.device("cpu")) == f"{words}, 2 threads"


def test_the_processor_s_model_is_read_where_the_system_tells_it(tmp_path, monkeypatch):
    info = tmp_path / "cpuinfo"
    info.write_text("processor\t: 0\nmodel name\t: Some(R) CPU @ 2GHz\n\nprocessor\t: 1\n")
    assert processor_model(info) == "Some(R) CPU @ 2GHz"
    monkeypatch.setattr(devices.platform, "processor", lambda: "arm")
    assert processor_model(tmp_path / "absent") == "arm"


def test_auto_takes_what_there_is(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert resolve_device("auto").type == "cpu"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert resolve_device("auto").type == "cuda"
    assert resolve_device("cpu").type == "cpu"


@pytest.mark.parametrize(("built_for", "reason"), [(None, "has no CUDA"), ("13.0", "no working")])
def test_a_gpu_that_is_not_there_is_an_error_with_the_reason(monkeypatch, built_for, reason):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", built_for)
    with pytest.raises(BackendUnavailableError, match=rf"'cuda' .*{reason}.*--device cpu"):
        resolve_device("cuda")


def test_an_unknown_device_is_refused():
    with pytest.raises(ConfigError, match="device is 'tpu'; it must be one of auto, cpu, cuda"):
        resolve_device("tpu")


def test_the_product_rate_is_measured_and_takes_no_random_numbers():
    before = torch.random.get_rng_state()
    rate = measure_product_rate(torch.device("cpu"), torch.float32, size=256, seconds=0.02)
    assert 1e8 < rate < 1e14
    assert torch.equal(torch.random.get_rng_state(), before)
