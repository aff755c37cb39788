"""GGUF files: read back with the library's reader, every tensor is what llama.cpp expects of it."""

import sys

import gguf
import numpy as np
import pytest
import torch

from nemotron3.checkpoint.safetensors import ShardedReader
from nemotron3.errors import CheckpointError, ConfigError, DataError, DependencyMissingError
from nemotron3.export import export_gguf
from nemotron3.quantization import formats_for, quantized_model
from nemotron3.text import CHAT_STYLES, Tokenizer
from nemotron3.text.jinja_export import jinja_source
from tests.tiny import WHOLE_BLOCKS, tiny_config, tiny_model

VOCABULARY = 320
TEXT = [
    "user\nassistant\n",
    *(f"say {n} {word}, Über 12" for n in range(9) for word in ("up", "no")),
]
PATTERNS = {"latent": "MEM*E/*E", "nano": "MEM*E", "dense": "M-*-M"}


def save(folder, pattern="MEM*E/*E", **changes):
    """A model directory with a tokenizer, and its configuration."""
    config = tiny_config(pattern, vocab_size=VOCABULARY, **changes)
    tiny_model(config).save_pretrained(folder)
    Tokenizer.train(TEXT * 4, vocab_size=VOCABULARY - 4).save(folder)
    return config


def tensors_of(file):
    """Tensors in PyTorch's order of dimensions, dequantized, and the types that they have."""
    reader = gguf.GGUFReader(file)
    values = {t.name: gguf.quants.dequantize(t.data, t.tensor_type) for t in reader.tensors}
    kinds = {t.name: t.tensor_type.name for t in reader.tensors}
    shapes = {t.name: tuple(int(size) for size in reversed(t.shape)) for t in reader.tensors}
    return {n: torch.from_numpy(np.array(v)).reshape(shapes[n]) for n, v in values.items()}, kinds


def fields_of(file):
    return {f.name: f.contents() for f in gguf.GGUFReader(file).fields.values()}


@pytest.mark.parametrize("kind", PATTERNS)
def test_every_tensor_but_those_of_the_draft_block_is_written(tmp_path, kind):
    changes = {"moe": {"moe_latent_size": None}} if kind == "nano" else {}
    config = save(tmp_path / "model", PATTERNS[kind], **changes)
    summary = export_gguf(tmp_path / "model", tmp_path / "out" / "m.gguf")
    held, kinds = tensors_of(summary.file)
    stored = dict(ShardedReader(tmp_path / "model").tensors())
    assert summary.dtype == "f32"
    (tmp_path / "plain").touch()
    assert summary.file.stat().st_mode == (tmp_path / "plain").stat().st_mode
    assert list(summary.file.parent.iterdir()) == [summary.file]
    assert set(kinds.values()) == {"F32"}
    assert len(held) == summary.num_tensors
    assert bool(summary.left_out) == bool(config.pattern.mtp)
    of_backbone = [name for name in stored if not name.startswith("mtp.")]
    assert sum(t.numel() for t in held.values()) == sum(stored[n].numel() for n in of_backbone)
    assert held["token_embd.weight"].equal(stored["backbone.embeddings.weight"])
    assert held["output.weight"].equal(stored["lm_head.weight"])
    assert held["output_norm.weight"].equal(stored["backbone.norm_f.weight"])
    for layer, symbol in enumerate(config.pattern.main):
        ours, theirs = f"backbone.layers.{layer}", f"blk.{layer}"
        assert held[f"{theirs}.attn_norm.weight"].equal(stored[f"{ours}.norm.weight"])
        if symbol == "M":
            a = held[f"{theirs}.ssm_a"]
            assert a.shape == (6, 1)
            torch.testing.assert_close(a[:, 0], -stored[f"{ours}.mixer.A_log"].exp())
            norm = held[f"{theirs}.ssm_norm.weight"]
            assert norm.shape == (2, 24)
            assert norm.flatten().equal(stored[f"{ours}.mixer.norm.weight"])
            conv = stored[f"{ours}.mixer.conv1d.weight"]
            assert held[f"{theirs}.ssm_conv1d.weight"].equal(conv.squeeze(1))
        elif symbol == "*":
            assert held[f"{theirs}.attn_k.weight"].equal(stored[f"{ours}.mixer.k_proj.weight"])
        elif symbol == "E":
            stack = held[f"{theirs}.ffn_down_exps.weight"]
            for expert, matrix in enumerate(stack):
                assert matrix.equal(stored[f"{ours}.mixer.experts.{expert}.down_proj.weight"])
            has_latent = f"{theirs}.ffn_latent_up.weight" in held
            assert has_latent == (kind == "latent")
        else:
            assert held[f"{theirs}.ffn_up.weight"].equal(stored[f"{ours}.mixer.up_proj.weight"])


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [("bf16", 2**-8), ("f16", 2**-10), ("q8_0", 1 / 127)]
)
def test_matrices_are_stored_in_the_type_that_is_asked_for(tmp_path, dtype, tolerance):
    save(tmp_path / "model")
    summary = export_gguf(tmp_path / "model", tmp_path / "m.gguf", dtype=dtype)
    exact, _ = tensors_of(export_gguf(tmp_path / "model", tmp_path / "f32.gguf").file)
    held, kinds = tensors_of(summary.file)
    for name, kind in kinds.items():
        is_vector = exact[name].squeeze().ndim == 1 or "conv1d" in name or "ssm_norm" in name
        if is_vector or "gate_inp" in name:
            assert kind == "F32"
            assert held[name].equal(exact[name])
            continue
        fits = dtype != "q8_0" or exact[name].shape[-1] % 32 == 0
        assert kind == (dtype.upper() if fits else "F16")
        bound = exact[name].abs().amax(-1, keepdim=True) * tolerance
        assert bool(((held[name] - exact[name]).abs() <= bound).all())
    assert {kind for name, kind in kinds.items() if "exps" in name} >= {dtype.upper()}


def test_a_bfloat16_model_keeps_its_values(tmp_path):
    config = tiny_config(vocab_size=VOCABULARY)
    tiny_model(config).to(torch.bfloat16).save_pretrained(tmp_path)
    Tokenizer.train(TEXT * 4, vocab_size=VOCABULARY).save(tmp_path)
    summary = export_gguf(tmp_path, tmp_path / "m.gguf")
    held, kinds = tensors_of(summary.file)
    assert (summary.dtype, kinds["blk.0.ssm_in.weight"]) == ("bf16", "BF16")
    stored = ShardedReader(tmp_path).load("backbone.layers.0.mixer.in_proj.weight")
    assert held["blk.0.ssm_in.weight"].equal(stored.float())


def test_the_fields_say_what_the_model_and_its_tokens_are(tmp_path):
    config = save(tmp_path / "model")
    tokenizer = Tokenizer.from_directory(tmp_path / "model")
    tokenizer.chat_template = jinja_source(CHAT_STYLES["nano"])
    tokenizer.save(tmp_path / "model")
    fields = fields_of(export_gguf(tmp_path / "model", tmp_path / "m.gguf").file)
    assert fields["general.architecture"] == "nemotron_h_moe"
    of_model = {k.partition(".")[2]: v for k, v in fields.items() if k.startswith("nemotron_h_moe")}
    assert of_model["feed_forward_length"] == [0, 24, 0, 0, 24]
    assert of_model["attention.head_count_kv"] == [0, 0, 0, 2, 0]
    assert (of_model["ssm.inner_size"], of_model["ssm.time_step_rank"]) == (48, 6)
    assert (of_model["expert_count"], of_model["expert_used_count"]) == (8, 3)
    assert of_model["moe_latent_size"] == 32
    assert of_model["expert_weights_scale"] == 2.5
    assert of_model["context_length"] == config.max_position_embeddings
    tokens, kinds = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]
    assert len(tokens) == len(kinds) == VOCABULARY
    assert kinds[tokenizer.im_end_id] == gguf.TokenType.CONTROL
    assert kinds[-4:] == [gguf.TokenType.UNUSED] * 4  # rows without a token
    assert tokens[tokenizer.encode("up")[0]].startswith("u")
    assert fields["tokenizer.ggml.eot_token_id"] == tokenizer.im_end_id
    assert fields["tokenizer.chat_template"] == tokenizer.chat_template


def test_what_llama_cpp_cannot_express_is_refused_before_anything_is_written(tmp_path):
    for pattern, why in [("MEM", "both Mamba and attention"), ("M*E-", "dense layers")]:
        save(tmp_path / pattern, pattern)
        with pytest.raises(ConfigError, match=why):
            export_gguf(tmp_path / pattern, tmp_path / "m.gguf")
    save(tmp_path / "model")
    (tmp_path / "there.gguf").touch()
    with pytest.raises(ConfigError, match="exists"):
        export_gguf(tmp_path / "model", tmp_path / "there.gguf")
    assert not (tmp_path / "m.gguf").exists()


def test_a_quantized_model_names_the_remedy(tmp_path):
    config = tiny_config("ME*E", **WHOLE_BLOCKS)
    model = tiny_model(config)
    quantized_model(model, formats_for(model, "nvfp4"), scales="max").save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="export the model that they were made from"):
        export_gguf(tmp_path, tmp_path / "m.gguf")


def test_other_tokenizers_are_refused(tmp_path):
    save(tmp_path)
    file = tmp_path / "tokenizer.json"
    text = file.read_text("utf-8")
    file.write_text(text.replace("\\\\p{N}|", "\\\\p{N}{1,3}|"), encoding="utf-8")
    with pytest.raises(DataError, match="splits text by"):
        export_gguf(tmp_path, tmp_path / "m.gguf")
    Tokenizer.train(["a b"], vocab_size=VOCABULARY).save(tmp_path)
    with pytest.raises(DataError, match="no merges"):
        export_gguf(tmp_path, tmp_path / "m.gguf")
    longer = Tokenizer.train(TEXT * 4, vocab_size=VOCABULARY + 20, num_special_tokens=64)
    longer.save(tmp_path)
    with pytest.raises(DataError, match="the model has 320 rows"):
        export_gguf(tmp_path, tmp_path / "m.gguf")


def test_weights_that_do_not_belong_to_the_configuration_are_refused(tmp_path):
    save(tmp_path)
    file = tmp_path / "config.json"
    text = file.read_text("utf-8")
    file.write_text(text.replace('"moe_latent_size": 32', '"moe_latent_size": 48'), "utf-8")
    with pytest.raises(CheckpointError, match="fc1_latent_proj"):
        export_gguf(tmp_path, tmp_path / "m.gguf")
    file.write_text(text.replace('"n_routed_experts": 8', '"n_routed_experts": 9'), "utf-8")
    with pytest.raises(CheckpointError, match="gate"):
        export_gguf(tmp_path, tmp_path / "m.gguf")


def test_a_write_that_fails_leaves_nothing(tmp_path, monkeypatch):
    save(tmp_path / "model")
    loaded = []

    def load(reader, name):
        loaded.append(name)
        if len(loaded) == 9:
            raise OSError(28, "No space left on device", "somewhere")
        return original(reader, name)

    original = ShardedReader.load
    monkeypatch.setattr(ShardedReader, "load", load)
    with pytest.raises(OSError, match="MB free"):
        export_gguf(tmp_path / "model", tmp_path / "m.gguf")
    assert [file.name for file in tmp_path.iterdir()] == ["model"]


def test_without_the_library_the_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(DependencyMissingError, match=r"nemotron3\[gguf\]"):
        export_gguf(tmp_path, tmp_path / "m.gguf")
