"""A student computes what its result will, and what is trained are the matrices before rounding."""

import pytest
import torch

from nemotron3.models.lora import is_adapted
from nemotron3.models.parameter import quantizable_names
from nemotron3.quantization import formats_for, quantized_model
from nemotron3.quantization.student import student_of, unrounded_model
from nemotron3.training.optimizers import AdamWConfig, build_optimizer
from tests.quantization.test_quantization import CONFIG
from tests.tiny import tiny_model, tokens_for
from tests.tolerances import FLOAT32


@pytest.mark.parametrize("wanted", ["nvfp4", "mixed", "int8"])
def test_it_computes_what_the_quantized_model_does(wanted, assert_close):
    model = tiny_model(CONFIG)
    formats = formats_for(model, wanted)
    student = student_of(model, formats, scales="mse")
    tokens = tokens_for(CONFIG, 2, 12)
    with torch.no_grad():
        expected = quantized_model(model, formats, scales="mse")(tokens)
        assert_close(student(tokens), expected, FLOAT32)
        # Twice rounded is once rounded: what is written is what was trained.
        again = quantized_model(unrounded_model(student, model), formats, scales="mse")
        assert torch.equal(again(tokens), expected)


def test_gradients_are_those_of_the_rounded_values_at_the_masters():
    model = tiny_model(CONFIG)
    formats = formats_for(model, "nvfp4")
    student = student_of(model, formats, scales="max")
    rounded = unrounded_model(student, model)
    for name in formats:
        value = student.get_submodule(name).value()
        prefix, _, last = name.rpartition(".")
        setattr(rounded.get_submodule(prefix), last, torch.nn.Parameter(value.detach()))
    rounded.requires_grad_(True)
    tokens = tokens_for(CONFIG, 1, 20)
    for each in (student, rounded):
        each(tokens).square().mean().backward()
    for name in formats:
        own = student.get_submodule(name).master.grad
        assert own is not None
        assert torch.equal(own, rounded.get_parameter(name).grad)


def test_all_else_is_a_copy_and_what_was_trained_has_the_dtypes_of_the_original():
    model = tiny_model(CONFIG, dtype=torch.bfloat16)
    formats = formats_for(model, "mixed")
    student = student_of(model, formats, scales="max")
    assert all(p.dtype == torch.float32 for p in student.parameters())
    before = {name: p.clone() for name, p in model.named_parameters()}
    optimizer = build_optimizer(student, AdamWConfig(lr=1e-3))
    assert not is_adapted(student)
    student(tokens_for(CONFIG, 1, 9)).square().mean().backward()
    optimizer.step()
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    plain = unrounded_model(student, model)
    found = dict(plain.named_parameters())
    assert found.keys() == before.keys()
    for name, tensor in found.items():
        wanted = torch.float32 if name in formats else before[name].dtype
        assert tensor.dtype == wanted, name
    trained = [n for n in quantizable_names(model) if n.startswith("backbone.")]
    assert not any(torch.equal(found[n].bfloat16(), before[n]) for n in trained)
    assert plain.companions is model.companions
