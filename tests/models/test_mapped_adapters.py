"""Adapters beside weights in the memory of their files: the same results, no page is written."""

from pathlib import Path

import pytest
import torch

from nemotron3.checkpoint.files import digest_file
from nemotron3.inference.base_llm import load_model
from nemotron3.inference.config import EngineConfig
from nemotron3.inference.engine import Engine
from nemotron3.inference.requests import SamplingParams
from nemotron3.inference.sequences import EngineRequest
from nemotron3.models.layout import SequenceLayout
from nemotron3.models.lora import (
    LoRAConfig,
    adapter_of,
    add_lora,
    dequantized_with,
    merge_into,
    shared_model,
    write_adapter,
)
from nemotron3.models.nemotron_h import LanguageModel
from nemotron3.ops.weights import ExpertMatrices
from tests.models.lora.adapted import EVERYTHING, with_change
from tests.models.test_mapped_weights import is_in, mappings, memory, smaps
from tests.models.test_modelopt import CONFIG, publish
from tests.tiny import tiny_model, tokens_for

pytestmark = pytest.mark.skipif(
    not Path("/proc/self/maps").exists(), reason="the system does not tell what is mapped"
)
PARTS = ("experts.up_proj",), ("experts.down_proj", "q_proj"), ("in_proj",), EVERYTHING.targets


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """NVFP4 experts, FP8 Mamba and shared experts, and bfloat16, which the adapter changes all."""
    root = tmp_path_factory.mktemp("mapped")
    tiny_model(CONFIG).save_pretrained(root / "plain")
    publish(root / "plain", root / "published")
    return root / "published"


@pytest.fixture(scope="module")
def adapter(folder):
    model = LanguageModel.from_pretrained(folder, dtype=torch.float32)
    add_lora(model, EVERYTHING, seed=0)
    write_adapter(folder.parent / "adapter", with_change(model), EVERYTHING, base="published")
    return folder.parent / "adapter"


def copied_model(folder, adapter=None):
    return load_model(folder, device="cpu", dtype=torch.float32, lora=adapter)


def answers(model, drafts=3):
    """Tokens and log-probabilities of three answers, of which steps are recorded."""
    config = EngineConfig(
        max_num_seqs=2, max_model_len=64, max_num_batched_tokens=16, max_draft_tokens=drafts
    )
    engine = Engine(model, config)
    for number, prompt in enumerate(((1, 2, 3, 4, 5), (7,), tuple(range(1, 30)))):
        params = SamplingParams(
            max_tokens=16, temperature=0.7, seed=number, logprobs=0, ignore_eos=True
        )
        engine.add(EngineRequest(request_id=str(number), prompt=prompt, params=params))
    found = {}
    while engine.has_work:
        for step in engine.step():
            scores = [score.logprob for score in step.logprobs]
            pairs = zip(step.tokens, scores, strict=True)
            found.setdefault(step.request_id, []).extend(pairs)
    assert [len(answer) for answer in found.values()] == [16] * 3
    return found


def anonymous_kib(folder):
    """KiB of a folder's mapped pages that were written, and so copied."""
    parts = smaps(folder)
    assert any(part["Rss"] for part in parts)
    return sum(part["Anonymous"] for part in parts)


@pytest.mark.parametrize("drafts", [0, 3])
def test_log_probabilities_are_those_of_a_copied_model(folder, adapter, drafts):
    """To the bit, through prompts in chunks, recorded steps and drafts."""
    before = digest_file(folder / "model.safetensors")
    mapped, copied = load_model(folder, device="cpu", lora=adapter), copied_model(folder, adapter)
    assert mapped.compute_dtype == copied.compute_dtype == torch.float32
    tokens = tokens_for(CONFIG, 2, 9)
    with torch.no_grad():
        logits = mapped(tokens)
        assert torch.equal(logits, copied(tokens))
        assert (logits - load_model(folder, device="cpu")(tokens)).abs().max() > 0.05
    assert answers(mapped, drafts) == answers(copied, drafts)
    assert anonymous_kib(folder) == 0
    assert digest_file(folder / "model.safetensors") == before


def test_only_the_changes_and_changed_plain_matrices_have_memory(folder, adapter):
    base = load_model(folder, device="cpu")
    model = load_model(folder, device="cpu", lora=adapter)
    assert model.mapped_bytes == base.mapped_bytes > 0
    ranges = mappings(folder)
    for name, tensor in memory(model).items():
        if name.endswith((".A", ".B")):
            assert not is_in(tensor, ranges), name
        elif ".base." in name and tensor.dim() == 2:
            assert is_in(tensor, ranges), name
    assert not is_in(model.lm_head.weight, ranges)
    assert is_in(model.backbone.embeddings.weight, ranges)
    assert model.lm_head.weight.dtype == torch.float32
    experts = model.get_submodule("backbone.layers.1.mixer.experts.up_proj.base")
    assert isinstance(experts, ExpertMatrices)


@pytest.mark.parametrize("targets", PARTS, ids=str)
def test_an_adapter_can_be_trained_beside_mapped_weights(folder, targets):
    """Gradients have the bits of those beside copied weights, of frozen experts included."""
    lora, tokens = LoRAConfig(rank=3, alpha=7.0, targets=targets), tokens_for(CONFIG, 30)
    layout, gradients = SequenceLayout.packed([19, 1, 10]), []
    for mapped in (True, False):
        options = {"mapped": True} if mapped else {"dtype": torch.float32}
        model = LanguageModel.from_pretrained(folder, **options)
        add_lora(model, lora, seed=0)
        with_change(model)
        logits = model(tokens, layout=layout)
        (logits.square() * torch.linspace(-1, 1, logits.shape[-1])).mean().backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad})
        if mapped:
            assert anonymous_kib(folder) == 0
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[1].items():
        if name.startswith("mtp."):  # which the loss above leaves
            assert gradient is None
            continue
        assert gradient.any(), name
        assert torch.equal(gradients[0][name], gradient), name


@torch.no_grad()
def test_an_engine_follows_the_training_of_its_adapter(folder):
    """`merge_into` writes into the changes beside mapped matrices, and into no page."""
    model = LanguageModel.from_pretrained(folder, mapped=True)
    add_lora(model, EVERYTHING, seed=0)
    served = shared_model(with_change(model))
    first = answers(served)
    with_change(model, seed=1)
    merge_into(served, model)
    assert answers(served) == answers(shared_model(model)) != first
    assert anonymous_kib(folder) == 0


@torch.no_grad()
def test_a_plain_model_is_made_of_mapped_weights_and_an_adapter(folder):
    made = []
    for options in ({"mapped": True}, {}):
        model = LanguageModel.from_pretrained(folder, **options)
        add_lora(model, EVERYTHING, seed=0)
        with_change(model)
        made.append(dequantized_with(shared_model(model, {}), adapter_of(model)))
    ours, theirs = (each.state_dict() for each in made)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name].to(t.dtype), t) for name, t in theirs.items())
