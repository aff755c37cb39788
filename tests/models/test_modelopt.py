"""Published quantized checkpoints: a directory as ModelOpt writes it, made here without our code.

The packing below is a second implementation, by the table of the format in the notes of the
published header: two elements a byte, the even column in the low half.
"""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from nemotron3.errors import CheckpointError, ConfigError
from nemotron3.inference.config import EngineConfig
from nemotron3.inference.engine import Engine
from nemotron3.models.cache.state_precision import StatePrecision
from nemotron3.models.nemotron_h import LanguageModel
from nemotron3.models.parameter import weight_format, weight_formats
from nemotron3.models.precision import convert_weights
from tests.tiny import WHOLE_BLOCKS, qwen_config, tiny_config, tiny_model, tokens_for
from tests.tolerances import FLOAT32

CONFIG = tiny_config("MEM*E/*E", **WHOLE_BLOCKS)
ELEMENTS = np.array([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0], dtype=np.float32)
EXPERT = "backbone.layers.1.mixer.experts.5.down_proj"
IN_PROJ = "backbone.layers.0.mixer.in_proj"
KEYS = "backbone.layers.3.mixer.k_proj"


def packed(matrix: torch.Tensor) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """The tensors of an NVFP4 weight, and the values that they stand for."""
    values = matrix.float().numpy()
    blocks = values.reshape(len(values), -1, 16)
    tensor_scale = np.float32(np.abs(values).max() / (6 * 448))
    wanted = torch.from_numpy(np.abs(blocks).max(-1) / 6 / tensor_scale)
    scales = wanted.to(torch.float8_e4m3fn)
    units = scales.float().numpy()[..., None] * tensor_scale
    distance = np.abs(np.abs(blocks / units)[..., None] - ELEMENTS)
    codes = distance.argmin(-1).astype(np.uint8)
    held = np.where(blocks < 0, -1, 1) * ELEMENTS[codes] * units
    codes = (codes | (blocks < 0).astype(np.uint8) << 3).reshape(values.shape)
    parts = {
        "weight": torch.from_numpy(codes[:, ::2] | codes[:, 1::2] << 4),
        "weight_scale": scales,
        "weight_scale_2": torch.tensor(tensor_scale),
    }
    return parts, torch.from_numpy(held.reshape(values.shape))


def eight_bits(matrix: torch.Tensor) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """The tensors of an FP8 weight, and the values that they stand for."""
    scale = matrix.float().abs().max() / 448
    codes = (matrix.float() / scale).to(torch.float8_e4m3fn)
    return {"weight": codes, "weight_scale": scale}, codes.float() * scale


def is_packed(name: str) -> bool:
    return ".experts." in name and not name.startswith("mtp.")


def is_eight_bits(name: str) -> bool:
    ends = ("in_proj.weight", "out_proj.weight")
    return name.endswith(ends) or (".shared_experts." in name and not name.startswith("mtp."))


@pytest.fixture(scope="module")
def plain_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("plain")
    tiny_model(CONFIG).save_pretrained(folder)
    return folder


def publish(plain_folder, folder, *, wrap=lambda scale: scale, prefix="", describe=True):
    """A directory like Ultra's: experts NVFP4, Mamba and shared experts FP8, the rest bfloat16.

    Returns the values that its tensors stand for.
    """
    folder.mkdir(exist_ok=True)
    tensors, values = {}, {}
    for name, tensor in load_file(plain_folder / "model.safetensors").items():
        stem = name.removesuffix("weight")
        if is_packed(name) or is_eight_bits(name):
            parts, values[name] = (packed if is_packed(name) else eight_bits)(tensor)
            parts["input_scale"] = torch.tensor(0.25 + len(tensors) / 1024)
            tensors |= {stem + part: wrap(t) if t.dim() == 0 else t for part, t in parts.items()}
            continue
        wide = name.endswith(("gate.weight", "A_log", "D", "dt_bias", "correction_bias"))
        tensors[name] = values[name] = tensor if wide else tensor.bfloat16()
        if name.endswith(("k_proj.weight", "v_proj.weight")) and name.startswith("backbone"):
            tensors[f"{stem}{stem[-7]}_scale"] = torch.tensor([0.5 if stem[-7] == "k" else 2.0])
    save_file({prefix + name: t.contiguous() for name, t in tensors.items()},
              folder / "model.safetensors")  # fmt: skip
    fields = json.loads((plain_folder / "config.json").read_text())
    fields |= {"dtype": "bfloat16", "torch_dtype": "bfloat16"}
    if describe:  # as collapsed as some published files
        fields["quantization_config"] = {
            "quant_method": "modelopt",
            "quant_algo": "MIXED_PRECISION",
            "ignore": ["lm_head", "mtp*"],
            "kv_cache_scheme": {"num_bits": 8, "type": "float", "dynamic": False},
        }
        described = {"producer": {"name": "modelopt", "version": "0.47.0"}}
        described["quantization"] = {
            "quant_algo": "MIXED_PRECISION",
            "kv_cache_quant_algo": "FP8",
            "exclude_modules": ["lm_head", "mtp*"],
        }
        (folder / "hf_quant_config.json").write_text(json.dumps(described))
    (folder / "config.json").write_text(json.dumps(fields))
    return values


@pytest.fixture
def folder(plain_folder, tmp_path):
    publish(plain_folder, tmp_path / "published")
    return tmp_path / "published"


def change(folder, edit):
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors")


def header(folder):
    """Shape, dtype and bytes of every tensor."""
    found = {}
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        for name in file.keys():  # noqa: SIM118
            t = file.get_tensor(name)
            found[name] = (tuple(t.shape), t.dtype, t.reshape(-1).view(torch.uint8).numpy().data)
    return found


@pytest.mark.parametrize("shape", [(), (1,)], ids=str)
@pytest.mark.parametrize("prefix", ["", "language_model."])
@pytest.mark.parametrize("describe", [True, False], ids=["described", "bare"])
def test_a_published_mix_is_read(plain_folder, tmp_path, shape, prefix, describe, assert_close):
    """Its values are those that the tensors stand for, whatever describes them."""
    values = publish(
        plain_folder, tmp_path / "it", wrap=lambda s: s.reshape(shape), prefix=prefix,
        describe=describe,
    )  # fmt: skip
    model = LanguageModel.from_pretrained(tmp_path / "it")
    formats = weight_formats(model)
    assert formats["backbone.layers.1.mixer.experts.up_proj"] == "nvfp4"
    assert formats["backbone.layers.2.mixer.out_proj.weight"] == "fp8"
    assert weight_format(model) == "mixed"
    assert not any(name.startswith(("lm_head", "mtp")) for name in formats)
    published = dict(_views(convert_weights(model.float(), None)))
    for name, value in values.items():
        assert torch.equal(published[name].float(), value.float()), name
    tokens = tokens_for(CONFIG, 2, 9)
    model.activation_dtype = torch.float32
    plain = LanguageModel.from_pretrained(plain_folder)
    with torch.no_grad():
        for name, view in _views(plain):
            view.copy_(values[name])
        assert_close(model(tokens), plain(tokens), FLOAT32)


def _views(model):
    from nemotron3.models.huggingface.nemotron_h import published_views  # noqa: PLC0415

    return published_views(model, CONFIG)


@pytest.mark.parametrize("shape", [(), (1,)], ids=str)
def test_a_published_mix_is_written_again_to_the_bit(plain_folder, tmp_path, shape):
    """Every tensor, with its dtype and shape, and both descriptions."""
    first, second = tmp_path / "first", tmp_path / "second"
    publish(plain_folder, first, wrap=lambda s: s.reshape(shape))
    LanguageModel.from_pretrained(first).save_pretrained(second)
    assert header(first) == header(second)
    for file in ("config.json", "hf_quant_config.json"):
        texts = (json.loads((f / file).read_text()) for f in (first, second))
        before, after = texts
        assert before == after


def test_a_description_is_renewed_with_the_formats(folder, tmp_path):
    model = convert_weights(LanguageModel.from_pretrained(folder), "fp8")
    model.save_pretrained(tmp_path / "again")
    described = json.loads((tmp_path / "again" / "hf_quant_config.json").read_text())
    assert described["quantization"]["quant_algo"] == "FP8"
    assert described["quantization"]["kv_cache_quant_algo"] == "FP8"
    assert "backbone.layers.1.mixer.gate" in described["quantization"]["exclude_modules"]
    assert "backbone.layers.0.mixer.conv1d" in described["quantization"]["exclude_modules"]
    assert f"{KEYS}.k_scale" in header(tmp_path / "again")
    convert_weights(model, None).save_pretrained(tmp_path / "again")
    assert not (tmp_path / "again" / "hf_quant_config.json").exists()
    assert "quantization_config" not in json.loads((tmp_path / "again/config.json").read_text())
    assert f"{IN_PROJ}.input_scale" not in header(tmp_path / "again")
    assert weight_format(LanguageModel.from_pretrained(tmp_path / "again")) is None


def test_keys_in_float8_have_the_published_scales(folder):
    """Those of the backbone; the MTP block has none there."""
    model = LanguageModel.from_pretrained(folder)
    narrow = StatePrecision(keys="float8")
    assert model.state_precision(narrow).key_scales == ((0.5, 2.0), (1.0, 1.0))
    assert model.state_precision(StatePrecision()) == StatePrecision()
    own = StatePrecision(keys="float8", key_scales=((1.0, 1.5), (1.0, 1.0)))
    assert model.state_precision(own) == own
    caches = model.new_state(1, narrow), Engine(model, EngineConfig(state=narrow)).cache
    for cache in caches:
        assert next(s.scales for s in cache.layers if hasattr(s, "scales")) == (0.5, 2.0)


@pytest.mark.parametrize(
    "lost",
    [
        f"{EXPERT}.weight_scale",
        f"{EXPERT}.weight_scale_2",
        f"{IN_PROJ}.weight_scale",
    ],
)
def test_a_lost_scale_is_named(folder, lost):
    change(folder, lambda tensors: tensors.pop(lost))
    with pytest.raises(CheckpointError, match=f"its scale '{lost}' is missing"):
        LanguageModel.from_pretrained(folder)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (
            lambda t: t.update({f"{EXPERT}.weight": t[f"{EXPERT}.weight"][:, :-1].contiguous()}),
            rf"'{EXPERT}.weight' has shape \(32, 55\), but config.json calls for \(32, 56\)",
        ),
        (
            lambda t: t.update(
                {f"{EXPERT}.weight_scale": t[f"{EXPERT}.weight_scale"][:-1].contiguous()}
            ),
            rf"'{EXPERT}.weight_scale' has shape \(31, 7\)",
        ),
        (
            lambda t: t.update({f"{EXPERT}.weight_scale": torch.ones(32, 7, dtype=torch.uint8)}),
            rf"'{EXPERT}.weight_scale' is stored as torch.uint8",
        ),
        (
            lambda t: t.update({f"{IN_PROJ}.weight_scale": torch.ones(2, 4)}),
            "fp8 has one scale for a matrix",
        ),
        (
            lambda t: t.update({f"{IN_PROJ}.input_scale": torch.ones(3)}),
            rf"'{IN_PROJ}.input_scale' has shape \(3,\)",
        ),
        (
            lambda t: t.update({f"{IN_PROJ}.weight_scale": torch.tensor(torch.nan)}),
            rf"'{IN_PROJ}.weight_scale': fp8: a scale is nan",
        ),
        (
            lambda t: t.update({f"{EXPERT}.weight_scale_2": torch.tensor(-1.0)}),
            rf"'{EXPERT}.weight_scale_2': nvfp4: a scale is -1.0",
        ),
        (
            lambda t: t[f"{EXPERT}.weight_scale"].view(torch.uint8).fill_(0x7F),
            rf"'{EXPERT}.weight_scale': nvfp4: NaN is stored",
        ),
        (
            lambda t: t[f"{IN_PROJ}.weight"].view(torch.uint8)[3, 4].fill_(0xFF),
            rf"'{IN_PROJ}.weight': fp8: NaN is stored",
        ),
        (
            lambda t: t.update({f"{KEYS}.input_scale": torch.ones(())}),
            f"holds 1 tensors .* first '{KEYS}.input_scale'",
        ),
        (
            lambda t: t.update(
                {
                    "backbone.embeddings.weight": torch.zeros(97, 64).to(torch.float8_e4m3fn),
                    "backbone.embeddings.weight_scale": torch.ones(()),
                }
            ),
            "'backbone.embeddings.weight' is stored in fp8, which is for matrices of products",
        ),
    ],
    ids=[
        "codes",
        "rows",
        "mx",
        "blocks",
        "inputs",
        "nan",
        "negative",
        "nan scale",
        "nan code",
        "stray",
        "embedding",
    ],
)
def test_a_wrong_part_is_named(folder, edit, message):
    change(folder, edit)
    with pytest.raises(CheckpointError, match=message):
        LanguageModel.from_pretrained(folder)


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"quant_method": "compressed-tensors"}, "compressed-tensors"),
        ({"quant_method": "gptq", "bits": 4}, "gptq"),
        ({"quant_method": "awq"}, "awq"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "bitsandbytes"),
        ({"quant_method": "fp8", "weight_block_size": [128, 128]}, "fp8"),
        ({"quant_method": "modelopt", "quant_algo": "W4A8_AWQ"}, "quant_algo is 'W4A8_AWQ'"),
        ({"quant_algo": "NVFP4_SVD"}, "quant_algo is 'NVFP4_SVD'"),
        (
            {
                "quant_method": "modelopt",
                "quant_algo": "MIXED_PRECISION",
                "quantized_layers": {"a.b": {"quant_algo": "MXFP8"}},
            },
            "quant_algo of a.b is 'MXFP8'",
        ),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_formats_of_other_programs_are_refused_before_anything_is_read(folder, record, message):
    fields = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(fields | {"quantization_config": record}))
    (folder / "model.safetensors").unlink()
    with pytest.raises(ConfigError, match=f"{message}.*NVFP4 and FP8 are read"):
        LanguageModel.from_pretrained(folder)


@pytest.mark.parametrize(
    ("name", "program"),
    [
        ("weight_packed", "compressed-tensors"),
        ("qweight", "GPTQ or AWQ"),
        ("weight_scale_inv", "DeepSeek"),
        ("weight.absmax", "bitsandbytes"),
        ("weight.quant_state.bitsandbytes__nf4", "bitsandbytes"),
        ("pre_quant_scale", "AWQ"),
    ],
)
def test_tensors_of_other_programs_tell_too(plain_folder, tmp_path, name, program):
    """Where no description says so."""
    publish(plain_folder, tmp_path, describe=False)
    change(tmp_path, lambda t: t.update({f"{IN_PROJ}.{name}": torch.ones(2)}))
    with pytest.raises(ConfigError, match=f"{IN_PROJ}.{name}' .*{program}"):
        LanguageModel.from_pretrained(tmp_path)


def test_a_served_model_takes_weights_of_its_own_formats_only(folder, tmp_path):
    from nemotron3.models.huggingface import prepared_weights  # noqa: PLC0415

    model = LanguageModel.from_pretrained(folder)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for tensor in model.state_dict().values():
        tensor.zero_()
    prepared_weights(model, CONFIG, folder)()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor.float(), before[name].float()), name
    with pytest.raises(ConfigError, match=r"in fp8, and the model's is plain"):
        prepared_weights(convert_weights(model, None), CONFIG, folder)


@pytest.mark.parametrize("weights", ["nvfp4", "fp8"])
def test_gate_and_value_of_a_transformer_are_two_matrices(tmp_path, weights):
    """They are one parameter, and have scales of their own in the files."""
    config = qwen_config(moe={"moe_intermediate_size": 112})
    plain = tiny_model(config)
    for router in plain.routers:
        router.e_score_correction_bias.zero_()  # the layout has no such tensor
    with torch.no_grad():
        for name, tensor in plain.named_parameters():
            if name.endswith("experts.up_proj"):
                tensor[:, 112:] *= 3
    plain.save_pretrained(tmp_path / "plain")
    read = LanguageModel.from_pretrained(tmp_path / "plain", weights=weights)
    read.save_pretrained(tmp_path / "held")
    assert json.loads((tmp_path / "held/config.json").read_text())["model_type"] == "qwen3_moe"
    tensors = load_file(tmp_path / "held/model.safetensors")
    last = "weight_scale_2" if weights == "nvfp4" else "weight_scale"
    stem = "model.layers.0.mlp.experts.3."
    gate, value = (tensors[f"{stem}{p}_proj.{last}"] for p in ("gate", "up"))
    assert gate.shape == value.shape == ()
    assert value > 1.5 * gate
    again = LanguageModel.from_pretrained(tmp_path / "held")
    assert weight_formats(again) == weight_formats(read)
    for name, tensor in again.state_dict().items():
        pair = (tensor, read.state_dict()[name])
        assert torch.equal(*(t.view(torch.uint8) if t.dtype.itemsize == 1 else t for t in pair))


PEAK = """
import json, resource, sys, torch
from nemotron3.models.nemotron_h import LanguageModel
from nemotron3.models.parameter import state_tensors

def peak_bytes():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

torch.set_num_threads(1)
LanguageModel.from_pretrained(sys.argv[1])
before = peak_bytes()
model = LanguageModel.from_pretrained(sys.argv[2])
held = sum(tensor.nbytes for _, tensor in state_tensors(model))
print(json.dumps([peak_bytes() - before, held]))
"""


def test_reading_needs_the_packed_bytes_only(folder, tmp_path):
    """The peak is the model with its codes, and the pages of the files: nothing is unpacked."""
    config = tiny_config(
        "MEME",
        hidden_size=512,
        moe={"moe_intermediate_size": 512, "moe_latent_size": 256, "n_routed_experts": 256,
             "moe_shared_expert_intermediate_size": 512},
    )  # fmt: skip
    large = LanguageModel.from_config(config)
    convert_weights(large, "nvfp4").save_pretrained(tmp_path / "large", max_shard_bytes=8_000_000)
    run = [sys.executable, "-c", PEAK, str(folder), str(tmp_path / "large")]
    found = subprocess.run(run, capture_output=True, text=True, check=True)
    peak, held = json.loads(found.stdout)
    assert held < 5 / 32 * sum(p.nbytes for p in large.parameters())
    # Pages of a mapped file count as resident: one shard of 8 MB.
    assert peak < 1.2 * held + 30_000_000
