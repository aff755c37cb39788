"""Parity with transformers' Nemotron-H, an implementation by other hands, over random models."""

import json

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from nemotron3.inference.llm import LLM
from nemotron3.inference.requests import SamplingParams
from nemotron3.models.config import ModelConfig
from nemotron3.models.layout import SequenceLayout, shift_left
from nemotron3.models.nemotron_h import LanguageModel
from tests.oracles import huggingface
from tests.tiny import named_gradients, tiny_config, tiny_model, tokens_for
from tests.tolerances import DECODE, ORACLE

pytest.importorskip("transformers")
from torch import nn
from transformers import NemotronHConfig, NemotronHForCausalLM
from transformers.masking_utils import create_causal_mask
from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHBlock, NemotronHRMSNorm

PATTERNS = ["MEM*E", "M", "*", "E", "-", "MM*-", "ME", "*E", "M-*E", "EM*"]
PROPERTY = settings(
    max_examples=50,
    derandomize=True,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


@st.composite
def configs(draw: st.DrawFn) -> ModelConfig:
    groups = draw(st.sampled_from([1, 2, 3]))
    kv_heads = draw(st.sampled_from([1, 2]))
    experts = draw(st.integers(2, 9))
    parts = {
        "mamba": {
            "n_groups": groups,
            "mamba_num_heads": groups * draw(st.integers(1, 3)),
            "mamba_head_dim": draw(st.sampled_from([3, 8])),
            "ssm_state_size": draw(st.sampled_from([5, 16])),
            "conv_kernel": draw(st.sampled_from([2, 4])),
            "chunk_size": draw(st.sampled_from([4, 8, 64])),
        },
        "attention": {
            "num_key_value_heads": kv_heads,
            "num_attention_heads": kv_heads * draw(st.integers(1, 3)),
            "head_dim": draw(st.sampled_from([8, 20])),
        },
        "moe": {
            "n_routed_experts": experts,
            "num_experts_per_tok": draw(st.integers(1, experts)),
            "moe_latent_size": draw(st.sampled_from([None, 24])),
            "routed_scaling_factor": draw(st.sampled_from([1.0, 2.5, 5.0])),
            "norm_topk_prob": draw(st.booleans()),
        },
        "mlp": {"intermediate_size": draw(st.sampled_from([17, 56]))},
    }
    pattern = draw(st.sampled_from(PATTERNS))
    names = {"M": "mamba", "*": "attention", "E": "moe", "-": "mlp"}
    used = {names[c]: parts[names[c]] for c in set(pattern)}
    return tiny_config(pattern, hidden_size=draw(st.sampled_from([32, 48])), **used)


@PROPERTY
@given(config=configs(), length=st.integers(1, 21), seed=st.integers(0, 99))
def test_transformers_reads_what_we_write(tmp_path, assert_close, config, length, seed):
    model = tiny_model(config, seed)
    model.save_pretrained(tmp_path)
    tokens = tokens_for(config, 2, length, seed=seed)
    theirs = huggingface.load(tmp_path)
    with torch.no_grad():
        assert_close(model(tokens), huggingface.logits_of(theirs, tokens), ORACLE)


@PROPERTY
@given(config=configs(), length=st.integers(1, 21), seed=st.integers(0, 99))
def test_we_read_what_transformers_writes(tmp_path, assert_close, config, length, seed):
    source = tiny_model(config, seed)
    source.save_pretrained(tmp_path / "ours")
    theirs = huggingface.load(tmp_path / "ours")
    huggingface.save(theirs, tmp_path / "theirs")
    read = LanguageModel.from_pretrained(tmp_path / "theirs")
    assert read.config.hybrid_override_pattern == config.hybrid_override_pattern
    tokens = tokens_for(config, 2, length, seed=seed)
    with torch.no_grad():
        assert_close(read(tokens), huggingface.logits_of(theirs, tokens), ORACLE)


@pytest.fixture
def pair(tmp_path):
    """The same randomized model, ours and transformers'."""

    def make(config):
        model = tiny_model(config)
        model.save_pretrained(tmp_path)
        return model, huggingface.load(tmp_path)

    return make


@pytest.mark.parametrize("latent", [None, 32])
def test_hidden_states_and_router_choices_agree_layer_by_layer(pair, assert_close, latent):
    config = tiny_config("MEM*EE", moe={"moe_latent_size": latent})
    ours, theirs = pair(config)
    tokens = tokens_for(config, 3, 21)
    with torch.no_grad():
        expected = theirs(
            tokens, use_cache=False, output_hidden_states=True, output_router_logits=True
        )
        layout = SequenceLayout.of(tokens)
        x = ours.embed(tokens.flatten())
        routings = []
        for layer, hidden in zip(ours.backbone.layers, expected.hidden_states, strict=False):
            assert_close(x, hidden.flatten(0, 1), ORACLE)
            x, routing = layer(x, layout)
            routings += [routing] if routing is not None else []
        assert_close(ours.backbone.norm_f(x), expected.hidden_states[-1].flatten(0, 1), ORACLE)
    gates = [block.mixer.gate for block in theirs.model.layers if block.block_type == "moe"]
    for routing, logits, gate in zip(routings, expected.router_logits, gates, strict=True):
        assert_close(routing.scores, logits.sigmoid(), ORACLE)
        chosen = (logits.sigmoid() + gate.e_score_correction_bias).topk(3).indices
        assert torch.equal(routing.indices.sort(-1).values, chosen.sort(-1).values)


@pytest.mark.parametrize("latent", [None, 32])
def test_gradients_of_every_parameter_agree(pair, assert_close, latent):
    config = tiny_config("MEM*E-", moe={"moe_latent_size": latent})
    ours, theirs = pair(config)
    tokens = tokens_for(config, 2, 19)
    functional = torch.randn(2, 19, config.vocab_size) / 19
    (ours(tokens) * functional).sum().backward()
    (theirs(tokens, use_cache=False).logits * functional).sum().backward()
    expected = {
        name.replace("model.", "backbone.", 1) if name.startswith("model.") else name: gradient
        for name, gradient in named_gradients(theirs).items()
    }
    gradients = named_gradients(ours)
    assert gradients.keys() == expected.keys()
    for name, gradient in gradients.items():
        scale = expected[name].abs().max()
        assert scale > 0, name
        assert_close(gradient / scale, expected[name] / scale, ORACLE)


def test_published_steps_are_not_floored_where_stock_transformers_does(pair, tmp_path):
    """Stock transformers' scan and step disagree once a dt is below 0.001; ours never do."""
    config = tiny_config("MM*E", mamba={"time_step_min": 0.1})
    ours, _ = pair(config)
    stock = huggingface.load(tmp_path, repair=False)
    tokens = tokens_for(config, 1, 13)

    def decoded_by_transformers(model):
        out = model(tokens[:, :1], use_cache=True)
        logits = [out.logits]
        for t in range(1, tokens.shape[1]):
            out = model(tokens[:, t : t + 1], past_key_values=out.past_key_values, use_cache=True)
            logits.append(out.logits)
        return torch.cat(logits, dim=1)

    with torch.no_grad():
        full = ours(tokens)
        state = ours.new_state(1)
        steps = [ours(tokens[:, t : t + 1], state=state) for t in range(tokens.shape[1])]
        scale = full.abs().max()
        assert (full - torch.cat(steps, 1)).abs().max() / scale < DECODE
        stock_gap = (huggingface.logits_of(stock, tokens) - decoded_by_transformers(stock)).abs()
        assert stock_gap.max() / scale > 100 * ORACLE
        repaired = huggingface.repaired(stock)
        gap = (huggingface.logits_of(repaired, tokens) - decoded_by_transformers(repaired)).abs()
        assert gap.max() / scale < ORACLE


class MTPOracle(nn.Module):
    """The multi-token-prediction head out of transformers' blocks; transformers has none."""

    def __init__(self, config, weights):
        super().__init__()
        fields = config.to_dict() | {
            "layers_block_type": config.mtp_layers_block_type,
            "num_nextn_predict_layers": 0,
        }
        self.config = NemotronHConfig(**fields)
        self.config._attn_implementation = "eager"
        width, eps = config.hidden_size, config.layer_norm_epsilon
        kinds = self.config.layers_block_type
        self.layers = nn.ModuleList(NemotronHBlock(self.config, i) for i in range(len(kinds)))
        first, last = self.layers[0], self.layers[-1]
        first.enorm, first.hnorm = NemotronHRMSNorm(width, eps), NemotronHRMSNorm(width, eps)
        first.eh_proj = nn.Linear(2 * width, width, bias=False)
        last.final_layernorm = NemotronHRMSNorm(width, eps)
        self.load_state_dict(self._stack_experts(weights))

    @staticmethod
    def _stack_experts(weights):
        stacked, experts = {}, {}
        for name, tensor in weights.items():
            name = name.removeprefix("mtp.")
            if ".experts." not in name:
                stacked[name] = tensor
                continue
            stem, expert, projection, _ = name.rsplit(".", 3)
            experts.setdefault(f"{stem}.{projection}", {})[int(expert)] = tensor
        for name, parts in experts.items():
            stacked[name] = torch.stack([parts[i] for i in range(len(parts))])
        return stacked

    def forward(self, embeddings, hidden):
        first, last = self.layers[0], self.layers[-1]
        x = first.eh_proj(torch.cat([first.enorm(embeddings), first.hnorm(hidden)], dim=-1))
        positions = torch.arange(x.shape[1])[None]
        mask = create_causal_mask(
            config=self.config,
            inputs_embeds=x,
            attention_mask=None,
            past_key_values=None,
            position_ids=positions,
        )
        for layer in self.layers:
            x = layer(x, attention_mask=mask if layer.block_type == "full_attention" else None)
        return last.final_layernorm(x)


def mtp_hidden_states(model, tokens, depths):
    """Our head's hidden states, one after another."""
    layout = SequenceLayout.of(tokens)
    stream = tokens.flatten()
    hidden = model.backbone(model.embed(stream), layout).hidden
    for depth in range(1, depths + 1):
        shifted, _ = shift_left(stream, layout.segments, depth)
        hidden, _ = model.mtp(model.embed(shifted), hidden, layout)
        yield hidden.unflatten(0, tokens.shape)


@pytest.mark.parametrize("mtp", ["*E", "*-", "*EE"])
def test_multi_token_prediction_agrees_at_every_depth(tmp_path, assert_close, mtp):
    config = tiny_config(f"MEM*E-/{mtp}/{mtp}")
    ours = tiny_model(config)
    ours.save_pretrained(tmp_path)
    theirs = huggingface.load(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    head = MTPOracle(theirs.config, {n: t for n, t in stored.items() if n.startswith("mtp.")})
    tokens = tokens_for(config, 2, 17)
    length = tokens.shape[1]
    with torch.no_grad():
        hidden = theirs.model(tokens, use_cache=False).last_hidden_state
        for depth, ours_k in enumerate(mtp_hidden_states(ours, tokens, depths=3), start=1):
            embeddings = theirs.model.embeddings(tokens[:, depth:])
            hidden = head(embeddings, hidden[:, : length - depth])
            assert_close(ours_k[:, : length - depth], hidden, ORACLE)
            logits = theirs.lm_head(hidden)
            assert_close(ours.logits(ours_k[:, : length - depth]), logits, ORACLE)


def test_what_transformers_drops_is_named(tmp_path):
    """transformers saves no MTP weights but keeps the field that asks for them."""
    tiny_model("M*/*E").save_pretrained(tmp_path / "ours")
    huggingface.save(huggingface.load(tmp_path / "ours"), tmp_path / "theirs")
    with pytest.raises(RuntimeError, match=r"mtp\.layers\.0.*num_nextn_predict_layers to 0"):
        LanguageModel.from_pretrained(tmp_path / "theirs")
    config = tmp_path / "theirs" / "config.json"
    fields = json.loads(config.read_text()) | {"num_nextn_predict_layers": 0}
    config.write_text(json.dumps(fields))
    assert LanguageModel.from_pretrained(tmp_path / "theirs").mtp is None


def test_greedy_generation_agrees(pair):
    config = tiny_config("MEM*E", eos_token_id=96)
    ours, theirs = pair(config)
    prompt = tokens_for(config, 1, 11)
    expected = theirs.generate(
        prompt, max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    greedy = SamplingParams(max_tokens=12, temperature=0.0, ignore_eos=True)
    (output,) = LLM(ours).generate(prompt.tolist(), greedy)
    assert list(output.outputs[0].token_ids) == expected[0, 11:].tolist()


def test_a_fresh_transformers_model_reads_too(tmp_path, assert_close):
    """Not by way of our files: a config and weights of transformers' own making."""
    config = NemotronHConfig(
        vocab_size=97,
        hidden_size=48,
        layers_block_type=["linear_attention", "moe", "full_attention", "mlp"],
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        mamba_num_heads=4,
        mamba_head_dim=12,
        ssm_state_size=16,
        n_groups=2,
        chunk_size=8,
        intermediate_size=40,
        n_routed_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=20,
        moe_shared_expert_intermediate_size=28,
        initializer_range=0.2,
    )
    theirs = huggingface.repaired(NemotronHForCausalLM(config)).eval()
    huggingface.save(theirs, tmp_path)
    ours = LanguageModel.from_pretrained(tmp_path)
    assert ours.config.hybrid_override_pattern == "ME*-"
    tokens = tokens_for(ours.config, 2, 19)
    with torch.no_grad():
        assert_close(ours(tokens), huggingface.logits_of(theirs, tokens), ORACLE)
