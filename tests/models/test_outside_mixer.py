"""The mixer of docs/guides/add-a-mixer.md, which is outside the package, in all features.

The code is the page's own, so that a reader of the page gets the tested code.
"""

import importlib.util
import re
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from hypothesis import settings

from nemotron3.config.record import from_record, to_record
from nemotron3.errors import ConfigError
from nemotron3.inference.config import EngineConfig
from nemotron3.inference.engine import Engine
from nemotron3.inference.model_runner import ModelRunner
from nemotron3.inference.requests import SamplingParams
from nemotron3.inference.sequences import EngineRequest
from nemotron3.models.cache.hybrid_cache import HybridCache
from nemotron3.models.config import ModelConfig
from nemotron3.models.costs import (
    forward_flops_per_token,
    kv_bytes_per_token,
    model_costs,
    state_bytes_per_sequence,
)
from nemotron3.models.layout import SequenceLayout
from nemotron3.models.lora import LoRAConfig, adapter_of, add_lora, shared_model
from nemotron3.models.nemotron_h import LanguageModel
from nemotron3.ops.segments import Segments
from nemotron3.training.batch import TrainBatch
from nemotron3.training.optimizers import AdamWConfig, build_optimizer, parameter_groups
from nemotron3.training.step import TrainingStep
from tests.contracts import test_one_forward as contract
from tests.models.cache.test_hybrid_cache import Verbs
from tests.models.lora.adapted import with_change
from tests.tiny import ATTENTION, MAMBA, MOE, tiny_config, tiny_model, tokens_for
from tests.tolerances import DECODE, FLOAT32, FLOAT64
from tests.training.batches import pretraining

PAGE = Path(__file__).parents[2] / "docs" / "guides" / "add-a-mixer.md"


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """The page's code as a module."""
    (code,) = re.findall(r"^```python\n(.*?)^```", PAGE.read_text("utf-8"), re.M | re.S)
    file = tmp_path_factory.mktemp("outside") / "leaky.py"
    file.write_text(code, encoding="utf-8")
    spec = importlib.util.spec_from_file_location("leaky_of_the_guide", file)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


@pytest.fixture(scope="module")
def config(page):
    return page.LeakyModelConfig(
        hybrid_override_pattern="LM*EL/*E",
        vocab_size=97,
        hidden_size=64,
        max_position_embeddings=512,
        attention=ATTENTION,
        mamba=MAMBA,
        moe=MOE,
        leaky=page.LeakyConfig(channels=24),
    )


@pytest.fixture(scope="module")
def alone(page):
    return page.LeakyModelConfig(
        hybrid_override_pattern="LL",
        vocab_size=97,
        hidden_size=64,
        leaky=page.LeakyConfig(channels=24),
    )


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, DECODE), (torch.float64, FLOAT64)]
)
@pytest.mark.parametrize("which", ["alone", "config"])
def test_it_is_one_forward(assert_close, request, which, dtype, tolerance):
    given = (assert_close, request.getfixturevalue(which), dtype, tolerance)
    for splits in ((29,), (1, 28), (3, 8, 9, 1, 1, 7), (16, 13)):
        contract.test_chunked_prefill_is_the_full_pass(*given, splits)
    contract.test_decoding_token_by_token_is_the_full_pass(*given)
    contract.test_packed_documents_are_separate_sequences(*given)
    contract.test_sequences_decode_packed_at_their_own_positions(*given)
    for wanted in ([0], [4, 23, 32], []):
        contract.test_what_is_wanted_of_a_call_are_rows_of_the_whole(*given, wanted)


@pytest.mark.slow
def test_the_verbs_of_the_cache_serve_it(page, config):
    """Snapshots, forks, drafts that are refused, in any order."""

    class LeakyVerbs(Verbs):
        CONFIG = replace(config, hybrid_override_pattern="L*/*", mamba=None, moe=None)

    LeakyVerbs.TestCase.settings = settings(max_examples=10, stateful_step_count=15, deadline=None)
    LeakyVerbs.TestCase("runTest").runTest()


@torch.no_grad()
def test_snapshots_forks_and_refused_drafts(assert_close, config):
    model = tiny_model(config)
    state, tokens = model.new_state(3), tokens_for(config, 30)
    model(tokens[:9], layout=state.layout([9], [1]), state=state)
    snapshot = state.snapshot(1)
    runner = ModelRunner(model, state)
    for count in (1, 3):
        tried = [*tokens[9 : 9 + count].tolist(), *[5] * (4 - count)]
        step = runner.decode([tried], [1], is_verification=True)
        whole = model(torch.tensor([[*tokens[:9].tolist(), *tried]]))[0, 9:]
        assert_close(step.logits[0], whole, DECODE)
        state.accept(step.layout, [count])
        state.fork(1, 2)
        after = runner.decode([[7], [7]], [2, 1])
        whole = model(torch.tensor([[*tokens[: 9 + count].tolist(), 7]]))[0, -1]
        assert_close(after.logits[:, 0], whole.expand(2, -1), DECODE)
        state.restore(1, snapshot)
    state.free(2)
    assert all(not layer.rows[0][2].any() for layer in state.layers if layer and layer.rows)


@pytest.mark.parametrize("drafts", [0, 2])
def test_an_engine_serves_it_as_the_full_pass_says(config, drafts):
    """With cached prefixes, drafts, and more requests than slots."""
    model = tiny_model(config, dtype=torch.float64)
    engine = Engine(
        model,
        EngineConfig(
            max_num_seqs=2,
            page_size=4,
            prefix_interval=4,
            max_model_len=64,
            max_draft_tokens=drafts,
        ),
    )
    prompts = [tokens_for(config, 9 + i, seed=i // 2).tolist() for i in range(4)]
    params = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True)
    for name, prompt in enumerate(prompts):
        engine.add(EngineRequest(request_id=str(name), prompt=tuple(prompt), params=params))
    answers = {}
    while engine.has_work:
        for progress in engine.step():
            answers.setdefault(int(progress.request_id), []).extend(progress.tokens)
    for name, prompt in enumerate(prompts):
        sequence = [*prompt, *answers[name]]
        with torch.no_grad():
            best = model(torch.tensor([sequence])).argmax(-1)[0, len(prompt) - 1 : -1]
        assert answers[name] == best.tolist()


def test_it_refuses_prefixes_that_it_would_not_heed(config):
    """Unless its configuration says `continues_prefixes`."""
    model = LanguageModel.from_config(config)
    layout = SequenceLayout(Segments([3, 2, 2]), prefixes=(0, 0))
    with pytest.raises(ConfigError, match="prefixes, which a mixer of this model does not heed"):
        model(torch.zeros(7, dtype=torch.int64), layout=layout)


def test_it_is_counted(config):
    model = LanguageModel.from_config(config)
    costs = model_costs(config)
    mixer = model.backbone.layers[0].mixer
    each = sum(p.numel() for p in mixer.parameters())
    assert costs.parameters["leaky"] == costs.active["leaky"] == 2 * each
    assert costs.total + costs.mtp_parameters == sum(p.numel() for p in model.parameters())
    without = tiny_config("M*E/*E")
    assert state_bytes_per_sequence(config, conv_itemsize=4) == (
        state_bytes_per_sequence(without)[0],
        state_bytes_per_sequence(without, conv_itemsize=4)[1] + 2 * 24 * 4,
    )
    assert kv_bytes_per_token(config) == kv_bytes_per_token(without)
    norms = 2 * config.hidden_size
    more = 2 * (2 * each + norms) + 2 * 3 * 24
    flops = [forward_flops_per_token(of, context=50) for of in (config, without)]
    assert flops[0] - flops[1] == more


def test_it_is_allocated_and_initialized_as_declared(config):
    wide, narrow = (
        LanguageModel.from_config(config, dtype=d) for d in (torch.float32, torch.bfloat16)
    )
    for model in (narrow, wide.to(torch.bfloat16)):
        mixer = model.backbone.layers[0].mixer
        assert mixer.in_proj.weight.dtype == torch.bfloat16
        assert mixer.decay.dtype == torch.float32
        assert mixer.decay.min() >= 0
        assert 1 < mixer.decay.max() <= 3
        ratio = mixer.in_proj.weight.float().std() / mixer.out_proj.weight.float().std()
        assert ratio.item() == pytest.approx(5**0.5, rel=0.15)
    tokens = tokens_for(config, 1, 12)
    with torch.no_grad():
        assert torch.equal(wide(tokens), narrow(tokens))


def test_it_is_saved_and_read(config, tmp_path):
    model = tiny_model(config)
    model.save_pretrained(tmp_path)
    read = LanguageModel.from_pretrained(tmp_path, config_class=type(config))
    assert read.config == config
    for name, tensor in model.state_dict().items():
        assert torch.equal(read.state_dict()[name], tensor), name
    with pytest.raises(ConfigError, match=r"leaky is .* ModelConfig has no such field"):
        LanguageModel.from_pretrained(tmp_path)
    assert from_record(type(config), to_record(config)) == config


def test_it_trains_in_the_groups_that_it_declares(config):
    model = LanguageModel.from_config(config)
    mixer = model.backbone.layers[0].mixer
    decayed, plain = ({id(p) for p in g["params"]} for g in parameter_groups(model, 0.1))
    assert {id(mixer.in_proj.weight), id(mixer.out_proj.weight)} <= decayed
    assert id(mixer.decay) in plain
    tokens = tokens_for(config, 40)
    batch = TrainBatch(
        tokens=tokens, targets=tokens.roll(-1), mask=torch.ones(40), segments=Segments([11, 1, 28])
    )
    optimizer, before = build_optimizer(model, AdamWConfig(lr=1e-2)), mixer.decay.detach().clone()
    update = TrainingStep(model, optimizer, pretraining(model), clip_grad_norm=1.0)
    losses = [update([batch], learning_rate=1e-2)["train/loss"] for _ in range(8)]
    assert losses[-1] < losses[0] - 0.5
    assert not torch.equal(mixer.decay, before)


def test_patterns_know_it_where_the_configuration_does(page, config, assert_close):
    with pytest.raises(ConfigError, match=r"'L' at position 0; allowed are M \(mamba\)"):
        tiny_config("LM")
    with pytest.raises(ConfigError, match=r"'X' at position 1; .*, L \(leaky\)"):
        replace(config, hybrid_override_pattern="LX")
    with pytest.raises(ConfigError, match=r"'L' layers but LeakyModelConfig\.leaky is None"):
        replace(config, leaky=None)
    same = page.LeakyModelConfig(
        **{name: getattr(tiny_config("M*E"), name) for name in ModelConfig.__dataclass_fields__}
    )
    tokens = tokens_for(config, 1, 9)
    with torch.no_grad():
        assert_close(tiny_model(same)(tokens), tiny_model(tiny_config("M*E"))(tokens), FLOAT32)


def test_two_kinds_of_one_character_are_refused(page):
    @dataclass(frozen=True, kw_only=True)
    class Other(page.LeakyConfig):
        symbol: ClassVar[str] = "M"

    @dataclass(frozen=True, kw_only=True)
    class Clash(ModelConfig):
        other: Other | None = None

    with pytest.raises(ConfigError, match=r"symbol is 'M'.*one of its own"):
        Clash(hybrid_override_pattern="M", vocab_size=9, hidden_size=8, mamba=MAMBA)


def test_a_state_that_is_declared_and_not_made_is_refused(page, config):
    @dataclass(frozen=True, kw_only=True)
    class Forgetful(page.LeakyConfig):
        def new_state(self, memory):
            del memory

    forgetful = replace(config, leaky=Forgetful(channels=24))
    with pytest.raises(ConfigError, match=r"Forgetful\.state_size is .* returns no state"):
        HybridCache(forgetful, slots=1, dtype=torch.float32, device=torch.device("cpu"))


@pytest.mark.parametrize("which", ["config", "alone"])
def test_what_is_declared_is_what_is_carried(request, which):
    """Of every kind of layer: bytes that tables and engines count are those of the tensors."""
    config = request.getfixturevalue(which)
    cache = HybridCache(config, slots=3, dtype=torch.float32, device=torch.device("cpu"), pages=2)
    for mixer, state in zip(config.layers, cache.layers, strict=True):
        if state is None:
            assert not mixer.is_stateful
            continue
        assert sum(rows[0].numel() for rows in state.rows) == mixer.state_size.per_sequence
        entries = sum(page[0, 0].numel() for page in state.pages)
        assert entries == mixer.state_size.per_token


@torch.no_grad()
def test_its_products_take_an_adapter(config):
    model = tiny_model(config)
    tokens = tokens_for(config, 1, 9)
    before = model(tokens)
    add_lora(model, LoRAConfig(rank=2), seed=0)
    assert torch.equal(model(tokens), before)
    names = adapter_of(model)
    assert any(name.startswith("backbone.layers.0.mixer.") for name in names)
    with_change(model)
    assert (model(tokens) - before).abs().max() > 0.01
    assert torch.equal(shared_model(model)(tokens), model(tokens))
