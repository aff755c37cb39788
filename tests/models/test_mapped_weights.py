"""Weights in the memory of their files: shared, never copied, never written back, and the same."""

import copy
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from nemotron3.checkpoint import ShardedReader
from nemotron3.checkpoint.files import digest_file
from nemotron3.checkpoint.mapping import mapped_tensors
from nemotron3.errors import CheckpointError, ConfigError
from nemotron3.inference.base_llm import load_model
from nemotron3.inference.config import EngineConfig
from nemotron3.inference.engine import Engine
from nemotron3.inference.requests import SamplingParams
from nemotron3.inference.sequences import EngineRequest
from nemotron3.models.nemotron_h import LanguageModel
from nemotron3.models.parameter import state_tensors, weight_formats
from nemotron3.ops.weights import ExpertMatrices
from tests.models.test_modelopt import CONFIG, EXPERT, IN_PROJ, change, publish
from tests.tiny import qwen_config, tiny_model, tokens_for

pytestmark = pytest.mark.skipif(
    not Path("/proc/self/maps").exists(), reason="the system does not tell what is mapped"
)
STACKED = "mtp.layers.1.mixer.experts."
"""The experts of the multi-token-prediction block are plain, and products want a stack of these."""


@pytest.fixture(scope="module")
def plain_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("plain")
    tiny_model(CONFIG).save_pretrained(folder)
    return folder


@pytest.fixture
def folder(plain_folder, tmp_path):
    publish(plain_folder, tmp_path / "published")
    return tmp_path / "published"


def mappings(folder):
    """Address ranges of this process that are files of a folder."""
    found = []
    for line in Path("/proc/self/maps").read_text().splitlines():
        ranges, *_, path = line.split(maxsplit=5)
        if path.startswith(str(folder)):
            found.append(tuple(int(end, 16) for end in ranges.split("-")))
    return found


def is_in(tensor, ranges):
    return any(start <= tensor.data_ptr() < end for start, end in ranges)


def memory(model):
    """Every tensor of a model, by name."""
    return dict(model.named_parameters()) | dict(model.named_buffers())


def answer(engine, length=12):
    params = SamplingParams(max_tokens=length, temperature=0.7, seed=3, ignore_eos=True)
    engine.add(EngineRequest(request_id="a", prompt=(1, 2, 3, 4, 5), params=params))
    tokens = []
    while engine.has_work:
        tokens += [token for step in engine.step() for token in step.tokens]
    return tokens


def engine_for(model):
    return Engine(model, EngineConfig(max_num_seqs=2, max_model_len=64))


def test_matrices_are_the_pages_of_the_file(folder):
    """All codes, block scales and plain matrices; what is copied is vectors and scales."""
    model = LanguageModel.from_pretrained(folder, mapped=True)
    ranges = mappings(folder)
    for name, tensor in memory(model).items():
        is_matrix = tensor.dim() == 2 and not name.startswith(STACKED)
        is_router = name.endswith("gate.weight")
        assert is_in(tensor, ranges) == (is_matrix and not is_router), name
    held = model.get_submodule("backbone.layers.1.mixer.experts.up_proj")
    assert isinstance(held, ExpertMatrices)
    assert held.nbytes < 1.1 * sum(held[e].codes.nbytes * 9 / 8 for e in range(8)) + 4 * 8 * 112


def test_it_computes_the_same_to_the_bit(folder):
    mapped = LanguageModel.from_pretrained(folder, mapped=True)
    copied = LanguageModel.from_pretrained(folder, dtype=torch.float32)
    assert weight_formats(mapped) == weight_formats(copied)
    tokens = tokens_for(CONFIG, 2, 9)
    with torch.no_grad():
        assert torch.equal(mapped(tokens), copied(tokens))
    assert answer(engine_for(mapped)) == answer(engine_for(copied))


def test_an_engine_writes_into_no_page_and_engines_share_them(folder):
    """Decoding, with drafts and recorded steps, leaves every mapped page as the file has it."""
    before = digest_file(folder / "model.safetensors")
    first, second = (load_model(folder, device="cpu") for _ in range(2))
    assert first.compute_dtype == torch.float32
    assert first.backbone.embeddings.weight.dtype == torch.bfloat16
    assert answer(engine_for(first)) == answer(engine_for(second))
    shares = [part for part in smaps(folder) if part["Rss"]]
    assert len(shares) == 2
    for part in shares:
        assert part["Anonymous"] == 0  # pages that were written, and so copied
        assert part["Shared_Clean"] + part["Shared_Dirty"] > 0
    assert digest_file(folder / "model.safetensors") == before


def smaps(folder):
    """KiB of each kind, of every mapping of a folder's files."""
    found, is_ours = [], False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        key, _, rest = line.partition(":")
        if "-" in key.split()[0]:
            is_ours = str(folder) in line
            if is_ours:
                found.append({})
        elif is_ours and rest.endswith("kB"):
            found[-1][key] = int(rest.split()[0])
    return found


def test_new_weights_are_copies_in_this_process_only(plain_folder, folder, tmp_path):
    """`update_weights` of a mapped model: its own answers change, no file and no other engine's."""
    publish(plain_folder, tmp_path / "other")
    change(tmp_path / "other", lambda t: t["lm_head.weight"].copy_(t["lm_head.weight"].roll(1, 0)))
    change(tmp_path / "other", lambda t: t[f"{EXPERT}.weight"].bitwise_not_())
    before = digest_file(folder / "model.safetensors")
    first, second = (engine_for(load_model(folder, device="cpu")) for _ in range(2))
    old = answer(first)
    first.update_weights(tmp_path / "other")
    new = answer(engine_for(load_model(tmp_path / "other", device="cpu")))
    assert answer(first) == new != old
    assert answer(second) == old
    assert digest_file(folder / "model.safetensors") == before


def test_a_file_that_is_replaced_stays_as_it_was_mapped(folder):
    engine = engine_for(load_model(folder, device="cpu"))
    old = answer(engine)
    LanguageModel.from_pretrained(folder).save_pretrained(folder)  # renames a new file over it
    change_by_rename(folder)
    assert answer(engine) == old
    assert answer(engine_for(load_model(folder, device="cpu"))) != old


def change_by_rename(folder):
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = tensors["lm_head.weight"].roll(1, 0)
    save_file(tensors, folder / "new.safetensors")
    (folder / "new.safetensors").replace(folder / "model.safetensors")


def test_shards_are_mapped_each(folder, tmp_path):
    whole = LanguageModel.from_pretrained(folder, mapped=True)
    LanguageModel.from_pretrained(folder).save_pretrained(tmp_path / "it", max_shard_bytes=20_000)
    assert len(list((tmp_path / "it").glob("model-*.safetensors"))) > 3
    model = LanguageModel.from_pretrained(tmp_path / "it", mapped=True)
    ranges = mappings(tmp_path / "it")
    assert is_in(model.lm_head.weight, ranges)
    assert is_in(model.get_submodule("backbone.layers.1.mixer.experts.up_proj")[7].codes, ranges)
    tokens = tokens_for(CONFIG, 2, 9)
    with torch.no_grad():
        assert torch.equal(model(tokens), whole(tokens))


@pytest.mark.parametrize("shift", range(1, 8))
def test_any_offset_in_the_file_is_read(folder, shift):
    """A header of any length moves all tensors; those off their element's alignment are copied."""
    expected = {n: t.clone() for n, t in load_file(folder / "model.safetensors").items()}
    file = folder / "model.safetensors"
    data = file.read_bytes()
    length = int.from_bytes(data[:8], "little")
    moved = data[8 : 8 + length] + b" " * shift + data[8 + length :]
    file.write_bytes((length + shift).to_bytes(8, "little") + moved)
    found = dict(mapped_tensors(ShardedReader(folder)))
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        assert tensor.data_ptr() % tensor.itemsize == 0
        bits = (t.reshape(-1).view(torch.uint8) for t in (tensor, expected[name]))
        assert torch.equal(*bits), name
    model = LanguageModel.from_pretrained(folder, mapped=True)
    ranges = mappings(folder)
    assert is_in(model.get_submodule("backbone.layers.1.mixer.experts.up_proj")[3].codes, ranges)
    assert is_in(model.lm_head.weight, ranges) == (shift % 2 == 0)
    assert torch.equal(model.lm_head.weight, expected["lm_head.weight"])


def test_formats_of_our_own_layouts_are_mapped(tmp_path):
    """int8; and SwiGLU, of which a file has two matrices where a product has one (copied)."""
    config = qwen_config(moe={"moe_intermediate_size": 32})
    for number, (kind, model) in enumerate(
        (("int8", tiny_model(CONFIG)), ("nvfp4", tiny_model(config)))
    ):
        model.save_pretrained(tmp_path / f"plain{number}")
        folder = tmp_path / kind
        LanguageModel.from_pretrained(tmp_path / f"plain{number}", weights=kind).save_pretrained(
            folder
        )
        mapped = LanguageModel.from_pretrained(folder, mapped=True)
        copied = LanguageModel.from_pretrained(folder)
        tokens = tokens_for(copied.config, 2, 9)
        with torch.no_grad():
            assert torch.equal(mapped(tokens), copied(tokens))
        down = mapped.get_submodule("backbone.layers.1.mixer.experts.down_proj")
        assert is_in(down[2].codes, mappings(folder))


def test_a_copy_of_a_mapped_model_has_its_own_memory(folder):
    model = LanguageModel.from_pretrained(folder, mapped=True)
    tokens = tokens_for(CONFIG, 2, 9)
    with torch.no_grad():
        before = model(tokens)
        other = copy.deepcopy(model)
        ranges = mappings(folder)
        assert not any(is_in(tensor, ranges) for tensor in memory(other).values())
        for _, weight in state_tensors(other):
            if isinstance(weight, ExpertMatrices):
                weight.copy_(torch.zeros(weight.shape))
        assert torch.equal(model(tokens), before)
        assert not torch.equal(other(tokens), before)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda t: t[f"{IN_PROJ}.weight"].view(torch.uint8)[3, 4].fill_(0xFF), "NaN is stored"),
        (lambda t: t[f"{EXPERT}.weight_scale"].view(torch.uint8).fill_(0x7F), "NaN is stored"),
        (lambda t: t.update({f"{EXPERT}.weight_scale_2": torch.tensor(-1.0)}), "a scale is -1.0"),
        (lambda t: t.pop(f"{EXPERT}.weight_scale"), "is missing"),
        (lambda t: t.pop("lm_head.weight"), "lacks 1 tensors"),
    ],
    ids=["nan code", "nan scale", "negative", "no scale", "no matrix"],
)
def test_what_a_copy_refuses_is_refused(folder, edit, message):
    change(folder, edit)
    with pytest.raises(CheckpointError, match=message):
        LanguageModel.from_pretrained(folder, mapped=True)


def test_a_truncated_file_is_refused(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match="truncated or damaged"):
        LanguageModel.from_pretrained(folder, mapped=True)


def test_mapped_weights_are_for_inference_on_the_cpu(folder):
    for given in ({"dtype": torch.bfloat16}, {"device": "meta"}):
        with pytest.raises(ConfigError, match="mapped weights are on the CPU"):
            LanguageModel.from_pretrained(folder, mapped=True, **given)
    model = LanguageModel.from_pretrained(folder, mapped=True)
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_plain_weights_and_a_dtype_of_ones_own_are_copied(plain_folder, folder):
    assert not mappings(plain_folder) + mappings(folder)
    kept = [load_model(plain_folder, device="cpu"), load_model(folder, dtype=torch.bfloat16)]
    assert kept[1].compute_dtype == torch.bfloat16
    assert not mappings(plain_folder) + mappings(folder)
