"""The default memory of an engine: most of a GPU's, and a part of the host's."""

import pytest
import torch

from nemotron3.errors import ConfigError
from nemotron3.inference.config import EngineConfig
from nemotron3.inference.engine import Engine, memory
from nemotron3.inference.engine.memory import batched_tokens, cache_bytes, engine_parts, page_bytes
from nemotron3.models.cache.state_precision import StatePrecision
from nemotron3.models.costs import state_bytes_per_sequence
from nemotron3.models.nemotron_h import LanguageModel
from tests.tiny import tiny_config, tiny_model

CPU, GPU = torch.device("cpu"), torch.device("cuda")
FREE = 100 << 30
STEP = 384 * 1024


@pytest.fixture(autouse=True)
def free(monkeypatch):
    """Set the free memory of a GPU, since there is none here."""
    monkeypatch.setattr(memory, "free_memory_bytes", lambda _: FREE)


def test_a_gpu_reads_more_at_a_time():
    assert batched_tokens(EngineConfig(), CPU) == 2048
    assert batched_tokens(EngineConfig(), GPU) == 8192
    for device in (CPU, GPU):
        assert batched_tokens(EngineConfig(max_num_batched_tokens=77), device) == 77


def test_a_machine_is_asked_for_a_quarter_of_what_is_free():
    model = tiny_model("M*")
    assert cache_bytes(model, EngineConfig(), CPU) == FREE // 4
    # Pages of the files of mapped weights count as free, and the weights need them.
    model.mapped_bytes = FREE // 2
    assert cache_bytes(model, EngineConfig(), CPU) == FREE // 8
    model.mapped_bytes = 3 * FREE
    assert cache_bytes(model, EngineConfig(), CPU) == FREE // 32


def test_a_gpu_is_asked_for_what_states_prefixes_and_a_step_leave():
    model = tiny_model("MEM*E")
    given = EngineConfig(max_num_seqs=5, prefix_cache_bytes=1000)
    states = 5 * sum(state_bytes_per_sequence(model.config, conv_itemsize=4))
    assert cache_bytes(model, given, GPU) == int(FREE * 0.9) - states - 1000 - 8192 * STEP
    shorter = EngineConfig(max_num_seqs=5, prefix_cache_bytes=0, max_num_batched_tokens=10)
    assert cache_bytes(model, shorter, GPU) == int(FREE * 0.9) - states - 10 * STEP


def test_drafts_leave_a_state_after_each_token_of_their_window():
    model = tiny_model(tiny_config("MEM*E/*E/*E"))
    with_drafts, without = (EngineConfig(max_draft_tokens=count) for count in (2, 0))
    states = 32 * sum(state_bytes_per_sequence(model.config, conv_itemsize=4))
    less = cache_bytes(model, without, GPU) - cache_bytes(model, with_drafts, GPU)
    assert less == 3 * states


def test_narrow_states_leave_more():
    model = tiny_model("MEM*E")
    narrow = EngineConfig(state=StatePrecision(ssm="int8"))
    assert cache_bytes(model, narrow, GPU) > cache_bytes(model, EngineConfig(), GPU)


def test_a_small_gpu_is_asked_for_a_quarter(monkeypatch):
    monkeypatch.setattr(memory, "free_memory_bytes", lambda _: 2 << 30)
    assert cache_bytes(tiny_model("M*"), EngineConfig(), GPU) == 1 << 29


def test_what_is_said_holds_and_what_is_not_is_counted(monkeypatch):
    model = tiny_model("M*")
    engine = Engine(model, EngineConfig(max_model_len=100, max_num_seqs=2))
    assert engine.scheduler.max_num_batched_tokens == 2048
    pages = len(engine.cache.pool)
    assert pages == 2 * 3  # two sequences, each of 100 tokens, a window of drafts, and one page
    monkeypatch.setattr(memory, "free_memory_bytes", lambda _: 100)
    with pytest.raises(ConfigError, match="25 bytes for keys and values hold 0 pages"):
        Engine(model, EngineConfig(max_model_len=100, max_num_seqs=2))


def test_a_plan_is_what_an_engine_allocates():
    model = tiny_model("MEM*E*")
    config = EngineConfig(max_num_seqs=3, max_model_len=50, prefix_cache_bytes=999, page_size=8)
    with torch.device("meta"):
        without_memory = LanguageModel(model.config)
    parts = {p.name: p.num_bytes for p in engine_parts(without_memory, config, CPU, 50)}
    cache = Engine(model, config).cache
    assert parts == {
        "engine states": cache.state_nbytes,
        "engine keys and values": len(cache.pool) * page_bytes(model, config),
        "engine prefix cache": 999,
        "engine prompt step": 0,
    }
    on_gpu = {p.name: p.num_bytes for p in engine_parts(without_memory, config, GPU, 50)}
    assert on_gpu["engine prompt step"] == 3 * 50 * STEP
    few = EngineConfig(max_num_seqs=3, kv_cache_bytes=2000, return_routed_experts=True)
    parts = {p.name: p.num_bytes for p in engine_parts(without_memory, few, CPU, 50)}
    assert (parts["engine keys and values"], parts["engine prefix cache"]) == (2000, 0)
