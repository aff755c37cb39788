"""What stays in float32 stays so through everything that converts, copies or loads a model."""

import copy
import pickle

import pytest
import torch

from nemotron3.models.nemotron_h import LanguageModel
from nemotron3.models.parameter import parameter_specs
from tests.tiny import qwen_config, tiny_config, tiny_model, tokens_for

CONFIG = tiny_config("MEM*E-/*E")
KEPT = ("A_log", "D", "dt_bias", "e_score_correction_bias", "gate.weight")
every_config = pytest.mark.parametrize("config", [CONFIG, qwen_config()], ids=["hybrid", "qwen"])


def assert_dtypes(model, dtype, *, kept=torch.float32):
    for name, tensor in model.state_dict().items():
        is_kept = name.endswith(KEPT)
        assert tensor.dtype == (kept if is_kept else dtype), name


CONVERSIONS = {
    "to": lambda model: model.to(torch.bfloat16),
    "bfloat16": lambda model: model.bfloat16(),
    "half": lambda model: model.half(),
    "type": lambda model: model.type(torch.float16),
    "to a device": lambda model: model.to("cpu", torch.bfloat16),
    "part by part": lambda model: model.apply(lambda part: part.to(torch.bfloat16)),
    "there and back": lambda model: model.double().float().to(torch.bfloat16),
}


@every_config
@pytest.mark.parametrize("convert", CONVERSIONS.values(), ids=CONVERSIONS.keys())
def test_a_narrow_model_keeps_them_exactly(config, convert):
    wide, model = tiny_model(config), tiny_model(config)
    convert(model)
    dtype = model.output_weight.dtype
    assert dtype in (torch.bfloat16, torch.float16)
    assert_dtypes(model, dtype)
    expected = wide.state_dict()
    for name, tensor in model.state_dict().items():
        rounded = expected[name].to(dtype).float()
        exact = name.endswith(KEPT)
        assert torch.equal(tensor.float(), expected[name] if exact else rounded), name


def test_a_wide_model_widens_them_too():
    assert_dtypes(tiny_model(CONFIG).double(), torch.float64, kept=torch.float64)
    assert_dtypes(tiny_model(CONFIG).double().half(), torch.float16)
    mixer = tiny_model(CONFIG).backbone.layers[0].mixer.to(torch.bfloat16)
    assert (mixer.A_log.dtype, mixer.in_proj.weight.dtype) == (torch.float32, torch.bfloat16)


def test_gradients_are_converted_as_their_parameters_are():
    model = tiny_model(CONFIG)
    model(tokens_for(CONFIG, 1, 5)).sum().backward()
    slopes = model.backbone.layers[0].mixer.A_log.grad.clone()
    model.to(torch.bfloat16)
    for name, parameter in model.named_parameters():
        assert parameter.grad is None or parameter.grad.dtype == parameter.dtype, name
    assert torch.equal(model.backbone.layers[0].mixer.A_log.grad, slopes)


def test_on_the_meta_device_and_from_it_to_memory():
    with torch.device("meta"):
        model = LanguageModel(CONFIG)
    model.to(torch.bfloat16)
    assert_dtypes(model, torch.bfloat16)
    assert all(tensor.is_meta for tensor in model.state_dict().values())
    model.to_empty(device="cpu")
    assert_dtypes(model, torch.bfloat16)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_declare_what_the_original_does(copied):
    model = tiny_model(CONFIG)
    other = copied(model)
    assert parameter_specs(other) == parameter_specs(model)
    assert_dtypes(other.to(torch.bfloat16), torch.bfloat16)
    assert_dtypes(model, torch.float32)


@pytest.mark.parametrize("assign", [False, True])
def test_loading_a_narrow_state_keeps_them(assign):
    narrow = {name: t.to(torch.bfloat16) for name, t in tiny_model(CONFIG).state_dict().items()}
    model = LanguageModel.from_config(CONFIG, dtype=torch.bfloat16)
    model.load_state_dict(narrow, assign=assign)
    assert_dtypes(model, torch.bfloat16)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor.float(), narrow[name].float()), name
    assert all(tensor.dtype == torch.bfloat16 for tensor in narrow.values())  # the caller's own
    assert all(parameter.is_leaf and parameter.requires_grad for parameter in model.parameters())
    assert_dtypes(model.half(), torch.float16)


def test_assigning_takes_the_tensors_themselves():
    given = tiny_model(CONFIG).state_dict()
    model = LanguageModel.from_config(CONFIG)
    model.load_state_dict(given, assign=True)
    for name, tensor in model.state_dict().items():
        assert tensor.data_ptr() == given[name].data_ptr(), name


@every_config
@torch.no_grad()
def test_a_converted_model_answers_as_one_loaded_narrow(config, tmp_path):
    model = tiny_model(config)
    if config is not CONFIG:  # its published layout has no selection bias
        for router in model.routers:
            router.e_score_correction_bias.zero_()
    model.save_pretrained(tmp_path)
    loaded = LanguageModel.from_pretrained(tmp_path, dtype=torch.bfloat16)
    converted = model.to(torch.bfloat16)
    tokens = tokens_for(config, 2, 19)
    assert torch.equal(converted(tokens), loaded(tokens))
    states = [converted.new_state(2), loaded.new_state(2)]
    pairs = [(converted, states[0]), (loaded, states[1])]
    for part in tokens.split([7, 1, 1, 10], dim=1):
        assert torch.equal(*(each(part, state=state) for each, state in pairs))


def test_a_model_written_narrow_is_read_as_it_was(tmp_path):
    model = tiny_model(CONFIG).to(torch.bfloat16)
    model.save_pretrained(tmp_path)
    read = LanguageModel.from_pretrained(tmp_path)
    assert_dtypes(read, torch.bfloat16)
    for name, tensor in read.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name]), name
