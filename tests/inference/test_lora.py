"""Answers of a model with an adapter are those of training's forward pass."""

import pytest
import torch

from nemotron3.errors import CheckpointError, ConfigError
from nemotron3.inference.config import EngineConfig
from nemotron3.inference.llm import LLM
from nemotron3.inference.requests import SamplingParams
from nemotron3.inference.served_adapters import load_served
from nemotron3.models.lora import (
    adapter_of,
    add_lora,
    merge_adapter,
    shared_model,
    trained_tensors,
    write_adapter,
)
from nemotron3.models.nemotron_h import LanguageModel
from nemotron3.models.precision import PrecisionConfig, apply_precision, convert_weights
from nemotron3.text import Tokenizer
from tests.models.lora.adapted import EVERYTHING, PATTERN, with_change
from tests.tiny import WHOLE_BLOCKS, tiny_config, tiny_model

PROMPTS = [[3, 5, 8], [9], list(range(1, 40)), [7, 7]]


@pytest.fixture
def model_and_folder(tmp_path):
    """A model with an adapter as training has it, and the directories of both."""
    tiny_model(tiny_config(PATTERN, vocab_size=288)).save_pretrained(tmp_path / "model")
    Tokenizer.train(["some text"], vocab_size=288).save(tmp_path / "model")
    model = LanguageModel.from_pretrained(tmp_path / "model")
    add_lora(model, EVERYTHING, seed=0)
    write_adapter(tmp_path / "adapter", with_change(model), EVERYTHING, base="model")
    return model, tmp_path


def logprobs_of(model, prompt, ids):
    """By training's forward pass."""
    tokens = torch.tensor([[*prompt, *ids]])
    logprobs = model(tokens)[0].log_softmax(-1)
    chosen = torch.tensor(ids)
    return logprobs[len(prompt) - 1 : -1].gather(-1, chosen[:, None]).flatten()


@pytest.mark.parametrize("drafts", [0, 3])
@torch.no_grad()
def test_log_probabilities_are_those_of_training(model_and_folder, drafts):
    """Through prefill in chunks, recorded steps, drafts and preemption."""
    model, folder = model_and_folder
    config = EngineConfig(
        max_num_seqs=3,
        max_model_len=72,
        max_num_batched_tokens=16,
        max_draft_tokens=drafts,
        adapts_drafts=False,
        page_size=8,
        kv_cache_bytes=12 * 2560 * (2 if drafts else 1),  # 12 pages: too few for all
    )
    llm = LLM(folder / "model", lora=folder / "adapter", device="cpu", config=config)
    params = SamplingParams(max_tokens=24, temperature=1.0, seed=1, logprobs=0, ignore_eos=True)
    for prompt, output in zip(PROMPTS, llm.generate(PROMPTS, params), strict=True):
        answer = output.outputs[0]
        ours = torch.tensor([entry.logprob for entry in answer.logprobs])
        theirs = logprobs_of(model, prompt, list(answer.token_ids))
        assert (ours - theirs).abs().max() <= 1e-5
    stats = llm.stats()
    assert stats.preemptions
    assert bool(stats.drafted_tokens) == bool(drafts)


@torch.no_grad()
def test_an_engine_beside_frozen_bfloat16_weights_agrees_in_float32(model_and_folder):
    """The merged copies have the dtype of activations, so nothing is rounded that training adds."""
    _, folder = model_and_folder
    options = {"dtype": torch.float32, "cast_dtype": torch.bfloat16}
    model = LanguageModel.from_pretrained(folder / "model", **options)
    apply_precision(model, PrecisionConfig(activations="float32"))
    add_lora(model, EVERYTHING, seed=0)
    with_change(model, size=0.1)
    params = SamplingParams(max_tokens=24, temperature=1.0, seed=1, logprobs=0, ignore_eos=True)
    for prompt, output in zip(
        PROMPTS, LLM(shared_model(model)).generate(PROMPTS, params), strict=True
    ):
        answer = output.outputs[0]
        ours = torch.tensor([entry.logprob for entry in answer.logprobs])
        theirs = logprobs_of(model, prompt, list(answer.token_ids))
        assert (ours - theirs).abs().max() <= 1e-5


@torch.no_grad()
def test_a_model_in_memory_stays_as_it_is(model_and_folder):
    _, folder = model_and_folder
    base = LanguageModel.from_pretrained(folder / "model")
    before = {name: t.clone() for name, t in base.state_dict().items()}
    params = SamplingParams(max_tokens=8, temperature=0.0, ignore_eos=True)
    plain = LLM(base).generate(PROMPTS, params)
    adapted = LLM(base, lora=folder / "adapter").generate(PROMPTS, params)
    read = LLM(folder / "model", lora=folder / "adapter", device="cpu").generate(PROMPTS, params)
    ids = [[o.outputs[0].token_ids for o in outputs] for outputs in (plain, adapted, read)]
    assert ids[0] != ids[1] == ids[2]
    assert all(torch.equal(t, before[name]) for name, t in base.state_dict().items())


@torch.no_grad()
def test_weights_are_quantized_after_the_adapter_is_merged(model_and_folder):
    model, folder = model_and_folder
    base = LanguageModel.from_pretrained(folder / "model")
    merge_adapter(base, adapter_of(model))
    expected = convert_weights(base, "int8").state_dict()
    llm = LLM(folder / "model", lora=folder / "adapter", weights="int8", device="cpu")
    for name, tensor in llm._engine.model.state_dict().items():
        assert torch.equal(tensor, expected[name]), name


def test_an_adapter_of_another_model_is_refused_when_it_is_read(model_and_folder, tmp_path):
    _, folder = model_and_folder
    other = tiny_model(tiny_config("M*E-", hidden_size=48, vocab_size=288))
    other.save_pretrained(tmp_path / "other")
    Tokenizer.from_directory(folder / "model").save(tmp_path / "other")
    with pytest.raises(CheckpointError, match="of another model"):
        LLM(tmp_path / "other", lora=folder / "adapter", device="cpu")


@pytest.mark.parametrize("weights", ["int8", "nvfp4"])
@torch.no_grad()
def test_an_adapter_stands_beside_weights_that_are_stored_quantized(tmp_path, weights):
    """Drafts and chunks of prompts included; a served adapter takes the memory of its tensors."""
    base = convert_weights(
        tiny_model(tiny_config(PATTERN, vocab_size=288, **WHOLE_BLOCKS)), weights
    )
    base.save_pretrained(tmp_path / "model")
    Tokenizer.train(["some text"], vocab_size=288).save(tmp_path / "model")
    model = LanguageModel.from_pretrained(tmp_path / "model")
    add_lora(model, EVERYTHING, seed=0)
    write_adapter(tmp_path / "adapter", with_change(model), EVERYTHING, base="model")
    config = EngineConfig(max_num_seqs=2, max_num_batched_tokens=16, max_draft_tokens=2)
    llm = LLM(tmp_path / "model", lora=tmp_path / "adapter", device="cpu", config=config)
    params = SamplingParams(max_tokens=12, temperature=1.0, seed=1, logprobs=0, ignore_eos=True)
    for prompt, output in zip(PROMPTS, llm.generate(PROMPTS, params), strict=True):
        answer = output.outputs[0]
        ours = torch.tensor([entry.logprob for entry in answer.logprobs])
        theirs = logprobs_of(model, prompt, list(answer.token_ids))
        assert (ours - theirs).abs().max() <= 1e-5
    with pytest.raises(ConfigError, match="an adapter beside quantized weights"):
        llm.update_weights(tmp_path / "model")
    served = load_served(tmp_path / "model", {"it": tmp_path / "adapter"}, device="cpu")
    try:
        own = sum(tensor.nbytes for tensor in trained_tensors(model).values())
        assert (
            served.adapters["it"].merged_bytes
            == own
            < 0.7 * sum(tensor.nbytes for tensor in base.state_dict().values())
        )
    finally:
        served.base.close()
        served.adapters["it"].llm.close()
