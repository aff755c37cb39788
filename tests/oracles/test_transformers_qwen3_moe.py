"""Parity with transformers' Qwen3-MoE, the transformer that the white paper compares with."""

import pytest
import torch

from nemotron3.inference.llm import LLM
from nemotron3.inference.requests import SamplingParams
from nemotron3.models.nemotron_h import LanguageModel
from tests.oracles import huggingface
from tests.tiny import named_gradients, qwen_config, tiny_model, tokens_for
from tests.tolerances import ORACLE

pytest.importorskip("transformers")
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

CONFIGS = {
    "published form": qwen_config(moe={"norm_topk_prob": True}),
    "weights not normalised": qwen_config(moe={"norm_topk_prob": False}),
    "one active expert": qwen_config(moe={"num_experts_per_tok": 1}),
    "tied": qwen_config(tie_word_embeddings=True),
    "deeper": qwen_config(5, hidden_size=48),
}
every_config = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)


def qwen_model(config) -> LanguageModel:
    """A tiny model without what Qwen's layout cannot hold."""
    model = tiny_model(config)
    for router in model.routers:
        router.e_score_correction_bias.zero_()
    return model


@every_config
def test_transformers_reads_what_we_write_and_we_what_it_writes(tmp_path, assert_close, config):
    ours = qwen_model(config)
    ours.save_pretrained(tmp_path / "ours")
    theirs = huggingface.load(tmp_path / "ours", Qwen3MoeForCausalLM)
    huggingface.save(theirs, tmp_path / "theirs")
    read = LanguageModel.from_pretrained(tmp_path / "theirs")
    for name, tensor in read.state_dict().items():
        assert torch.equal(tensor, ours.state_dict()[name]), name
    for length in (1, 23):
        tokens = tokens_for(config, 2, length)
        with torch.no_grad():
            assert_close(ours(tokens), huggingface.logits_of(theirs, tokens), ORACLE)


def test_gradients_agree(tmp_path, assert_close):
    config = CONFIGS["published form"]
    ours = qwen_model(config)
    ours.save_pretrained(tmp_path)
    theirs = huggingface.load(tmp_path, Qwen3MoeForCausalLM)
    tokens = tokens_for(config, 2, 19)
    functional = torch.randn(2, 19, config.vocab_size) / 19
    (ours(tokens) * functional).sum().backward()
    (theirs(tokens, use_cache=False).logits * functional).sum().backward()
    gradients, expected = named_gradients(ours), named_gradients(theirs)
    for layer in range(2):
        attention = f"backbone.layers.{2 * layer}"
        mixture = f"backbone.layers.{2 * layer + 1}"
        stem = f"model.layers.{layer}"
        pairs = {
            f"{attention}.norm.weight": f"{stem}.input_layernorm.weight",
            f"{attention}.mixer.q_norm.weight": f"{stem}.self_attn.q_norm.weight",
            f"{attention}.mixer.k_proj.weight": f"{stem}.self_attn.k_proj.weight",
            f"{attention}.mixer.o_proj.weight": f"{stem}.self_attn.o_proj.weight",
            f"{mixture}.norm.weight": f"{stem}.post_attention_layernorm.weight",
            f"{mixture}.mixer.gate.weight": f"{stem}.mlp.gate.weight",
            f"{mixture}.mixer.experts.up_proj": f"{stem}.mlp.experts.gate_up_proj",
            f"{mixture}.mixer.experts.down_proj": f"{stem}.mlp.experts.down_proj",
        }
        for name, other in pairs.items():
            scale = expected[other].abs().max()
            assert scale > 0, name
            assert_close(gradients[name] / scale, expected[other] / scale, ORACLE)


def test_a_fresh_transformers_model_reads_too(tmp_path, assert_close):
    config = Qwen3MoeConfig(
        vocab_size=97,
        hidden_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=20,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=20,
        intermediate_size=20,
        initializer_range=0.2,
        rope_parameters={"rope_type": "default", "rope_theta": 5000.0},
    )
    theirs = Qwen3MoeForCausalLM(config).eval()
    huggingface.save(theirs, tmp_path)
    ours = LanguageModel.from_pretrained(tmp_path)
    assert ours.config.attention.rope_theta == 5000.0
    tokens = tokens_for(ours.config, 2, 19)
    with torch.no_grad():
        assert_close(ours(tokens), huggingface.logits_of(theirs, tokens), ORACLE)


def test_greedy_generation_agrees(tmp_path):
    """Rotary positions continue where the state left off."""
    config = CONFIGS["published form"]
    ours = qwen_model(config)
    ours.save_pretrained(tmp_path)
    theirs = huggingface.load(tmp_path, Qwen3MoeForCausalLM)
    prompt = tokens_for(config, 1, 11)
    expected = theirs.generate(
        prompt, max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    greedy = SamplingParams(max_tokens=12, temperature=0.0, ignore_eos=True)
    (output,) = LLM(ours).generate(prompt.tolist(), greedy)
    assert list(output.outputs[0].token_ids) == expected[0, 11:].tolist()
