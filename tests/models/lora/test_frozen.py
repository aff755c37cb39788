"""Frozen weights in the dtype of activations: what is kept in it, and that it changes nothing."""

import pytest
import torch

from nemotron3.models.layout import SequenceLayout
from nemotron3.models.lora import (
    LoRAConfig,
    add_lora,
    changed_parameters,
    merge_own_adapter,
    shared_model,
    trained_tensors,
)
from nemotron3.models.nemotron_h import LanguageModel
from nemotron3.models.precision import PrecisionConfig
from nemotron3.recipes.adapters import model_to_play, model_to_train
from tests.models.lora.adapted import EVERYTHING, PATTERN, with_change
from tests.tiny import qwen_config, tiny_config, tiny_model, tokens_for

MODELS = {
    "whole": tiny_config(PATTERN),
    "transformer": qwen_config(),
    "tied": tiny_config("M*-", tie_word_embeddings=True),
}
NARROW = PrecisionConfig(activations="bfloat16")
ALL = LoRAConfig(rank=3, alpha=7.0)
CPU = torch.device("cpu")
BFLOAT16 = 0.05
"""Of the norm of a gradient, how far one in bfloat16 is from the one in float32."""


@pytest.fixture(params=MODELS.values(), ids=MODELS.keys())
def stored(request, tmp_path):
    """The directory of a model in float32."""
    tiny_model(request.param).save_pretrained(tmp_path)
    return str(tmp_path)


def trained(path, lora=ALL, precision=NARROW):
    return with_change(model_to_train(path, lora, precision=precision, device=CPU, seed=0))


def test_only_what_is_cast_is_kept_narrow(stored):
    model = trained(stored)
    kept = {torch.bfloat16: set(), torch.float32: set()}
    for name, tensor in model.state_dict().items():
        kept[tensor.dtype].add(name)
    adapter = trained_tensors(model).keys()
    assert adapter < kept[torch.float32]
    for name in kept[torch.float32] - adapter:
        ends = ("norm", "gate", "conv1d", "A_log", "D", "dt_bias", "bias")
        assert any(end in name for end in ends), name
    assert any("embeddings" in name for name in kept[torch.bfloat16])
    for name in kept[torch.bfloat16]:
        assert any(end in name for end in ("proj", "embeddings", "lm_head")), name
    wide = trained(stored, precision=PrecisionConfig())
    assert all(tensor.dtype == torch.float32 for tensor in wide.state_dict().values())


@torch.no_grad()
def test_frozen_weights_compute_the_same_as_wide_ones(stored):
    narrow = model_to_play(stored, ALL, precision=NARROW, device=CPU)
    wide = model_to_play(stored, None, precision=NARROW, device=CPU)
    assert narrow.backbone.embeddings.weight.dtype == torch.bfloat16
    assert wide.backbone.embeddings.weight.dtype == torch.float32
    tokens = tokens_for(wide.config, 2, 19)
    assert torch.equal(narrow(tokens), wide(tokens))


def gradients(model, routes=None):
    """Of an adapter, by name; and the experts that were chosen."""
    tokens, used = tokens_for(model.config, 27), []

    def head(output):
        used.append(output.routes)
        parts = [hidden @ output.output_weight.to(hidden.dtype).T for hidden in output.hidden]
        return sum(part.float().log_softmax(-1)[:, :5].mean() for part in parts)

    layout = SequenceLayout.packed([19, 1, 7])
    depths = model.config.pattern.num_mtp_depths
    options = {"layout": layout, "mtp_depths": depths, "routes": routes}
    model(tokens, head=head, recompute=True, **options).backward()
    assert all(p.grad.dtype == torch.float32 for p in model.parameters() if p.requires_grad)
    return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}, used[0]


def test_an_adapter_has_the_gradients_of_a_wide_base(stored):
    """To the bit where the stored weights are bfloat16, as they are published."""
    source = LanguageModel.from_pretrained(stored)
    with torch.no_grad():
        for name in changed_parameters(source, ALL):
            weight = source.get_parameter(name)
            weight.copy_(weight.bfloat16())
    source.save_pretrained(stored)
    wide = LanguageModel.from_pretrained(stored, dtype=torch.float32)
    wide.activation_dtype = torch.bfloat16
    add_lora(wide, ALL, seed=0)
    (ours, _), (theirs, _) = gradients(trained(stored)), gradients(with_change(wide))
    assert ours.keys() == theirs.keys()
    for name, gradient in theirs.items():
        assert torch.equal(ours[name], gradient), name


def test_an_adapters_gradients_are_near_those_in_float32(stored):
    exact, routes = gradients(trained(stored, precision=PrecisionConfig()))
    ours, _ = gradients(trained(stored), routes)
    ours, exact = (torch.cat([g.flatten() for g in each.values()]) for each in (ours, exact))
    assert (ours - exact).norm() <= BFLOAT16 * exact.norm()


@torch.no_grad()
def test_merged_models_are_the_trained_one(stored):
    model = trained(stored)
    tokens = tokens_for(model.config, 2, 19)
    logits = model(tokens)
    served = shared_model(model)
    assert torch.equal(served(tokens), logits)
    played = model_to_play(stored, ALL, precision=NARROW, device=CPU)
    theirs = played.state_dict()
    for name, tensor in served.state_dict().items():
        assert theirs[name].dtype == tensor.dtype, name
        assert torch.equal(theirs[name], tensor) == (name not in changed_parameters(played, ALL))
    places = {t.data_ptr() for t in model.state_dict().values()}
    merge_own_adapter(model)
    assert {t.data_ptr() for t in model.state_dict().values()} < places
    assert torch.equal(model(tokens), logits)


@torch.no_grad()
def test_a_saved_model_is_read_as_it_was_trained(tmp_path):
    config = MODELS["whole"]
    source = tiny_model(config, dtype=torch.bfloat16)
    source.save_pretrained(tmp_path / "base")
    model = trained(str(tmp_path / "base"), EVERYTHING)
    merge_own_adapter(model)
    model.save_pretrained(tmp_path / "merged")
    read = LanguageModel.from_pretrained(tmp_path / "merged")
    assert read.backbone.embeddings.weight.dtype == torch.bfloat16
    for name, tensor in read.state_dict().items():
        assert torch.equal(tensor.float(), model.state_dict()[name].float()), name
