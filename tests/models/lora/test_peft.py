"""Adapter directories: PEFT's names and layout, written, read and refused."""

import copy
import json
import sys
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from nemotron3.errors import CheckpointError
from nemotron3.models.lora import (
    LoRAConfig,
    adapter_of,
    add_lora,
    merge_adapter,
    read_adapter,
    write_adapter,
)
from nemotron3.models.lora.adapter import products
from nemotron3.models.nemotron_h import LanguageModel
from tests.models.lora.adapted import EVERYTHING, PATTERN, SMALL, adapted_model, with_change
from tests.tiny import qwen_config, tiny_model, tokens_for

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
GOLDEN = {
    "backbone.layers.0.mixer.in_proj": ((3, 64), (142, 3)),
    "backbone.layers.0.mixer.out_proj": ((3, 48), (64, 3)),
    "backbone.layers.1.mixer.experts.base_layer": ((24, 32), (24, 24)),
    "backbone.layers.1.mixer.experts": ((24, 24), (32, 24)),
    "backbone.layers.1.mixer.shared_experts.up_proj": ((3, 64), (40, 3)),
    "backbone.layers.1.mixer.shared_experts.down_proj": ((3, 40), (64, 3)),
    "backbone.layers.1.mixer.fc1_latent_proj": ((3, 64), (32, 3)),
    "backbone.layers.1.mixer.fc2_latent_proj": ((3, 32), (64, 3)),
    "backbone.layers.2.mixer.q_proj": ((3, 64), (80, 3)),
    "backbone.layers.2.mixer.k_proj": ((3, 64), (40, 3)),
    "backbone.layers.2.mixer.v_proj": ((3, 64), (40, 3)),
    "backbone.layers.2.mixer.o_proj": ((3, 80), (64, 3)),
    "backbone.layers.3.mixer.up_proj": ((3, 64), (56, 3)),
    "backbone.layers.3.mixer.down_proj": ((3, 56), (64, 3)),
    "mtp.layers.0.eh_proj": ((3, 128), (64, 3)),
    "mtp.layers.0.mixer.up_proj": ((3, 64), (56, 3)),
    "mtp.layers.0.mixer.down_proj": ((3, 56), (64, 3)),
    "lm_head": ((3, 64), (97, 3)),
}
"""Modules as PEFT names them, with the shapes of A and B; `experts` wraps the second matrix."""


@pytest.fixture
def base():
    return tiny_model(PATTERN)


@pytest.fixture
def folder(tmp_path):
    write_adapter(tmp_path, adapted_model(), EVERYTHING, base="base")
    return tmp_path


def assert_same(one, other):
    assert one.keys() == other.keys()
    for name, change in one.items():
        assert torch.equal(change.A, other[name].A), name
        assert torch.equal(change.B, other[name].B), name
        assert change.scale == other[name].scale, name


def edit(folder, change):
    """Rewrite the tensors of an adapter."""
    tensors = load_file(folder / WEIGHTS)
    save_file({k: v.clone().contiguous() for k, v in change(tensors).items()}, folder / WEIGHTS)


def configure(folder, **fields):
    file = folder / CONFIG
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


def test_names_and_shapes_are_those_of_peft(tmp_path):
    write_adapter(tmp_path, adapted_model("ME*-/-"), EVERYTHING, base="base")
    shapes = {name: tuple(t.shape) for name, t in load_file(tmp_path / WEIGHTS).items()}
    expected = {}
    for module, pair in GOLDEN.items():
        for matrix, shape in zip("AB", pair, strict=True):
            expected[f"base_model.model.{module}.lora_{matrix}.weight"] = shape
    assert shapes == expected
    fields = json.loads((tmp_path / CONFIG).read_text())
    assert fields["peft_type"] == "LORA"
    assert (fields["r"], fields["lora_alpha"]) == (3, 7.0)
    assert fields["base_model_name_or_path"] == "base"
    assert fields["target_parameters"] == ["experts.up_proj", "experts.down_proj"]
    assert set(fields["target_modules"]) == {
        *("in_proj", "out_proj", "up_proj", "down_proj", "fc1_latent_proj", "fc2_latent_proj"),
        *("q_proj", "k_proj", "v_proj", "o_proj", "eh_proj", "lm_head"),
    }


@pytest.mark.parametrize(
    "targets",
    [
        ("all-linear",),
        EVERYTHING.targets,
        ("experts.up_proj",),
        ("experts.down_proj", "q_proj"),
        ("layers.1.mixer.experts.up_proj", "layers.4.mixer.experts.down_proj"),
        ("layers.0.mixer.in_proj", "shared_experts.up_proj"),
    ],
)
def test_what_is_written_is_read(base, tmp_path, targets):
    config = replace(SMALL, targets=targets)
    model = adapted_model(lora=config)
    write_adapter(tmp_path, model, config, base="base")
    assert_same(read_adapter(tmp_path, base), adapter_of(model))
    assert_same(read_adapter(tmp_path, model), adapter_of(model))


def test_targets_in_the_file_name_nothing_else(tmp_path):
    config = replace(SMALL, targets=("layers.0.mixer.in_proj", "shared_experts.up_proj"))
    write_adapter(tmp_path, adapted_model(lora=config), config, base="base")
    fields = json.loads((tmp_path / CONFIG).read_text())
    assert fields["target_modules"] == ["layers.0.mixer.in_proj", "shared_experts.up_proj"]
    assert fields["target_parameters"] is None


def test_the_published_transformer_has_its_own_names(tmp_path):
    model = LanguageModel.from_config(qwen_config())  # without a selection bias, which Qwen lacks
    model.save_pretrained(tmp_path / "model")
    model = LanguageModel.from_pretrained(tmp_path / "model")
    base = copy.deepcopy(model)
    add_lora(model, SMALL, seed=0)
    with_change(model)
    write_adapter(tmp_path, model, SMALL, base="base")
    names = {n.removeprefix("base_model.model.") for n in load_file(tmp_path / WEIGHTS)}
    assert "model.layers.1.self_attn.q_proj.lora_A.weight" in names
    assert "model.layers.1.mlp.experts.base_layer.lora_B.weight" in names
    fields = json.loads((tmp_path / CONFIG).read_text())
    assert fields["target_parameters"] == ["experts.gate_up_proj", "experts.down_proj"]
    assert_same(read_adapter(tmp_path, base), adapter_of(model))


@pytest.mark.parametrize(
    "spell",
    [
        lambda name: name.replace(".model.backbone.", ".model.model."),
        lambda name: name.replace(".weight", ".default.weight"),
        lambda name: name.removeprefix("base_model.model."),
    ],
)
def test_other_spellings_are_read(folder, base, spell):
    edit(folder, lambda tensors: {spell(name): t for name, t in tensors.items()})
    assert_same(read_adapter(folder, base), adapter_of(adapted_model()))


def by_expert(tensors):
    """The experts' changes under a name for each, as vLLM and unfused models have them."""
    found = {}
    for name, tensor in tensors.items():
        stem, _, matrix = name.removesuffix(".weight").rpartition(".")
        if not stem.endswith((".experts", ".experts.base_layer")):
            found[name] = tensor
            continue
        part = "up_proj" if stem.endswith("base_layer") else "down_proj"
        owner = stem.removesuffix(".base_layer")
        for expert in range(8):
            own = (
                tensor[3 * expert : 3 * expert + 3] if matrix == "lora_A" else tensor[:, expert::8]
            )
            found[f"{owner}.{expert}.{part}.{matrix}.weight"] = own
    return found


def test_adapters_by_expert_are_read(folder, base):
    edit(folder, by_expert)
    assert_same(read_adapter(folder, base), adapter_of(adapted_model()))


def test_scales_follow_the_configuration(folder, base):
    configure(folder, use_rslora=True)
    assert read_adapter(folder, base)["lm_head"].scale == pytest.approx(7 / 3**0.5)
    configure(
        folder,
        use_rslora=False,
        alpha_pattern={"q_proj": 30.0, r"layers\.1\.mixer\.experts\..*": 12.0},
    )
    adapter = read_adapter(folder, base)
    assert adapter["backbone.layers.3.mixer.q_proj"].scale == 10
    assert adapter["backbone.layers.1.mixer.experts.up_proj"].scale == 4
    assert adapter["backbone.layers.4.mixer.experts.up_proj"].scale == 7 / 3
    assert adapter["lm_head"].scale == 7 / 3
    wide = "base_model.model.lm_head.lora_"
    edit(
        folder,
        lambda tensors: (
            tensors | {f"{wide}A.weight": torch.ones(5, 64), f"{wide}B.weight": torch.ones(97, 5)}
        ),
    )
    configure(folder, rank_pattern={"lm_head": 5}, alpha_pattern={})
    assert read_adapter(folder, base)["lm_head"].scale == 7 / 5


def test_the_output_layer_that_peft_saves_beside_must_be_the_models(folder, base):
    saved = "base_model.model.lm_head.base_layer.weight"
    edit(folder, lambda tensors: tensors | {saved: base.output_weight})
    assert_same(read_adapter(folder, base), adapter_of(adapted_model()))
    edit(folder, lambda tensors: tensors | {saved: base.output_weight + 1})
    with pytest.raises(CheckpointError, match="is not the weight of this model"):
        read_adapter(folder, base)


IN_PROJ = "base_model.model.backbone.layers.0.mixer.in_proj.lora_A.weight"


def renamed(old, new):
    """IN_PROJ's tensor under a second name."""
    return lambda tensors: tensors | {IN_PROJ.replace(old, new): tensors[IN_PROJ]}


def replaced(tensor):
    return lambda tensors: tensors | {IN_PROJ: tensor}


def without(part, split=lambda tensors: tensors):
    return lambda tensors: {k: v for k, v in split(tensors).items() if part not in k}


def of_another_expert(tensors):
    return {k.replace("experts.5.", "experts.9."): v for k, v in by_expert(tensors).items()}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (replaced(torch.ones(3, 65)), r"0.mixer.in_proj.lora_A.weight' has shape \(3, 65\)"),
        (replaced(torch.ones(2, 64)), r"calls for \(3, 64\)"),
        (replaced(torch.full((3, 64), torch.nan)), "not finite"),
        (without(IN_PROJ), "lacks lora_A of backbone.layers.0"),
        (renamed("layers.0", "layers.9"), "no product of this model"),
        (renamed("in_proj", "gate"), "no product of this model"),
        (renamed("lora_A", "lora_magnitude_vector"), "is no low-rank"),
        (renamed(".weight", ".default.weight"), "are both A of"),
        (
            without(".experts.5.up_proj.lora_B", by_expert),
            "lacks lora_B of expert 5 of backbone.layers.1.mixer.experts.up_proj",
        ),
        (of_another_expert, "lacks lora_A of expert 5"),
        (without(""), "holds no tensor"),
    ],
)
def test_tensors_that_do_not_fit_are_named(folder, base, change, said):
    edit(folder, change)
    with pytest.raises(CheckpointError, match=said):
        read_adapter(folder, base)


def test_an_adapter_of_another_shape_is_refused_by_its_tensor(folder):
    other = tiny_model("MEM*E-/*E/*E", seed=1)
    wider = LanguageModel.from_config(replace(other.config, hidden_size=72))
    with pytest.raises(CheckpointError, match=r"'base_model.model.*' has shape"):
        read_adapter(folder, wider)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"peft_type": "IA3"}, "peft_type is 'IA3'"),
        ({"use_dora": True}, "use_dora is True"),
        ({"bias": "all"}, "bias is 'all'"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"init_lora_weights": "pissa_niter_4"}, "pissa_niter_4"),
        ({"r": 0}, "r is 0"),
        ({"lora_alpha": None}, "lora_alpha is None"),
    ],
)
def test_other_kinds_of_adapters_are_refused(folder, base, fields, said):
    configure(folder, **fields)
    with pytest.raises(CheckpointError, match=said):
        read_adapter(folder, base)


def test_directories_that_are_no_adapter_say_what_is_missing(folder, base, tmp_path):
    with pytest.raises(CheckpointError, match=f"holds no {CONFIG}"):
        read_adapter(tmp_path / "nowhere", base)
    (folder / WEIGHTS).write_bytes(b"cut")
    with pytest.raises(CheckpointError, match="cannot be read as safetensors"):
        read_adapter(folder, base)
    (folder / WEIGHTS).unlink()
    with pytest.raises(CheckpointError, match=f"holds no {WEIGHTS}"):
        read_adapter(folder, base)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.skipif(sys.platform != "linux", reason="peft is tried where CI runs")
@pytest.mark.parametrize(
    "targets", [("all-linear",), ("experts.up_proj", "q_proj"), ("experts.down_proj", "lm_head")]
)
def test_peft_merges_and_saves_the_same(tmp_path, targets):
    """PEFT, if it is installed, on transformers' model: equal weights, and its files are read."""
    peft = pytest.importorskip("peft")
    from transformers import AutoModelForCausalLM  # noqa: PLC0415 - it takes seconds

    base = tiny_model("MEM*E")
    base.save_pretrained(tmp_path / "model")
    config = replace(SMALL, targets=targets)
    model = copy.deepcopy(base)
    add_lora(model, config, seed=0)
    with_change(model)
    write_adapter(tmp_path / "ours", model, config, base=str(tmp_path / "model"))
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    adapted = peft.PeftModel.from_pretrained(theirs, tmp_path / "ours")
    adapted.save_pretrained(tmp_path / "theirs")
    assert_same(read_adapter(tmp_path / "theirs", base), adapter_of(model))
    merged = adapted.merge_and_unload().state_dict()
    merge_adapter(base, adapter_of(model))
    for name, product in products(base).items():
        place = name.replace("backbone.", "model.")
        weight = merged[place if place in merged else f"{place}.weight"]
        assert torch.allclose(weight, product.weight, atol=1e-6), name


def test_a_merged_file_computes_what_the_adapter_does(folder, base):
    tokens = tokens_for(base.config, 2, 9)
    merge_adapter(base, read_adapter(folder, base))
    assert torch.equal(base(tokens), adapted_model()(tokens))


def test_without_targets_there_is_no_file_of_nothing(tmp_path):
    config = LoRAConfig(rank=1)
    model = tiny_model("M")
    add_lora(model, config, seed=0)
    write_adapter(tmp_path, model, config, base="base")
    assert len(load_file(tmp_path / WEIGHTS)) == 2
