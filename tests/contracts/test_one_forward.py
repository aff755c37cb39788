"""One forward pass: whole, in chunks, token by token and packed with others, it is the same model.

For each kind of layer alone and for the whole stack: in float32 within `DECODE` of the scale of the
logits, in float64 to rounding. What one document holds never changes a bit of another's result.
"""

import pytest
import torch

from nemotron3.errors import ConfigError
from nemotron3.models.layout import SequenceLayout
from nemotron3.models.nemotron_h import LanguageModel
from nemotron3.ops.cross_entropy import linear_cross_entropy
from nemotron3.ops.segments import Segments
from tests.tiny import named_gradients, qwen_config, tiny_config, tiny_model, tokens_for
from tests.tolerances import DECODE, FLOAT32, FLOAT64

MODELS = {
    "mamba": tiny_config("MM"),
    "attention": tiny_config("**"),
    "experts": tiny_config("EE"),
    "dense": tiny_config("--"),
    "rotary": qwen_config(),
    "whole": tiny_config("MEM*E-ME"),
    "wide experts": tiny_config("ME*E", moe={"moe_latent_size": None}),
}
PRECISIONS = [(torch.float32, DECODE), (torch.float64, FLOAT64)]
every_model = pytest.mark.parametrize("config", MODELS.values(), ids=MODELS.keys())
every_precision = pytest.mark.parametrize(
    ("dtype", "tolerance"), PRECISIONS, ids=["float32", "float64"]
)


@every_precision
@every_model
@pytest.mark.parametrize("splits", [(29,), (1, 28), (28, 1), (3, 8, 9, 1, 1, 7), (16, 13)])
@torch.no_grad()
def test_chunked_prefill_is_the_full_pass(assert_close, config, dtype, tolerance, splits):
    model = tiny_model(config, dtype=dtype)
    tokens = tokens_for(config, 2, sum(splits))
    state = model.new_state(2)
    chunks = [model(part, state=state) for part in tokens.split(splits, dim=1)]
    assert_close(torch.cat(chunks, dim=1), model(tokens), tolerance)
    assert state.lengths == [sum(splits)] * 2


@every_precision
@every_model
@torch.no_grad()
def test_decoding_token_by_token_is_the_full_pass(assert_close, config, dtype, tolerance):
    model = tiny_model(config, dtype=dtype)
    tokens = tokens_for(config, 1, 37)
    state = model.new_state(1)
    steps = [model(token, state=state) for token in tokens.split(1, dim=1)]
    assert_close(torch.cat(steps, dim=1), model(tokens), tolerance)


@every_precision
@every_model
def test_packed_documents_are_separate_sequences(assert_close, config, dtype, tolerance):
    model = tiny_model(config, dtype=dtype)
    lengths = [5, 1, 19, 8, 1, 16]
    documents = [tokens_for(config, 1, n, seed=n + i) for i, n in enumerate(lengths)]
    packed = model(torch.cat(documents, 1).flatten(), layout=SequenceLayout.packed(lengths))
    alone = torch.cat([model(document).flatten(0, 1) for document in documents])
    assert_close(packed, alone, tolerance)


@every_precision
@every_model
@torch.no_grad()
def test_sequences_decode_packed_at_their_own_positions(assert_close, config, dtype, tolerance):
    """Prompts of unequal length, then steps with slots permuted, left out, and several tokens."""
    model = tiny_model(config, dtype=dtype)
    sequences = [tokens_for(config, 40, seed=seed) for seed in range(3)]
    state = model.new_state(slots=4)
    done = dict.fromkeys((2, 0, 3), 0)
    outputs = {slot: [] for slot in done}
    calls = [
        {2: 7, 0: 1, 3: 12},
        {3: 1, 2: 1, 0: 1},
        {0: 1},
        {2: 1, 3: 1},
        {0: 3, 3: 3, 2: 3},
        {3: 9, 0: 2},
        {2: 1, 0: 5, 3: 1},
    ]
    for call in calls:
        layout = state.layout(list(call.values()), list(call))
        parts = [sequences[slot % 3][done[slot] : done[slot] + n] for slot, n in call.items()]
        logits = model(torch.cat(parts), layout=layout, state=state)
        for (slot, n), part in zip(call.items(), logits.split(list(call.values())), strict=True):
            outputs[slot].append(part)
            done[slot] += n
    assert state.lengths == [done[0], 0, done[2], done[3]]
    for slot, parts in outputs.items():
        full = model(sequences[slot % 3][None, : done[slot]]).flatten(0, 1)
        assert_close(torch.cat(parts), full, tolerance)


PREFIXES = {
    "two prompts": ([9, 4, 3, 1, 20, 2], (0, 1, 0, 0)),
    "shorter than the convolution": ([1, 2, 5, 1], (1, 0)),
    "one alone": ([6, 17, 4, 4], (1, 1)),
    "longer than a chunk": ([37, 21], (0,)),
}
"""Lengths in the stream, and what its last sequences continue."""


@every_precision
@every_model
@pytest.mark.parametrize(("lengths", "prefixes"), PREFIXES.values(), ids=PREFIXES.keys())
def test_sequences_that_continue_a_prefix_are_whole_sequences(
    assert_close, config, dtype, tolerance, lengths, prefixes
):
    """Outputs, and the gradients of a loss of all tokens: a prefix has those of every use."""
    first = len(lengths) - len(prefixes)
    parts = [tokens_for(config, n, seed=i) for i, n in enumerate(lengths)]
    wholes = [torch.cat([parts[p], part]) for p, part in zip(prefixes, parts[first:], strict=True)]
    factors = torch.rand(sum(lengths), config.vocab_size, dtype=dtype)
    model = tiny_model(config, dtype=dtype)

    layout = SequenceLayout(Segments(lengths), prefixes=prefixes)
    shared = model(torch.cat(parts), layout=layout)
    (shared * factors).sum().backward()
    gradients = named_gradients(model)

    model.zero_grad()
    lone = [model(part[None])[0] for part in parts[:first]]
    rest = [model(w[None])[0, -len(p) :] for w, p in zip(wholes, parts[first:], strict=True)]
    assert_close(shared, torch.cat(lone + rest), tolerance)
    (torch.cat(lone + rest) * factors).sum().backward()
    for name, gradient in named_gradients(model).items():
        assert_close(gradients[name], gradient, tolerance)


def test_what_does_not_heed_prefixes_refuses_them():
    lengths, prefixes = [5, 2, 3], (0, 0)
    layout = SequenceLayout(Segments(lengths), prefixes=prefixes)
    tokens = torch.zeros(10, dtype=torch.int64)
    with pytest.raises(ConfigError, match="mtp_depths is 1 and the layout has prefixes"):
        tiny_model("M/*E")(tokens, layout=layout, head=lambda output: output, mtp_depths=1)
    with pytest.raises(ConfigError, match="prefixes and slots"):
        SequenceLayout(Segments(lengths), slots=(0, 1, 2), prefixes=prefixes)
    for wrong in ((1, 0), (0, -1), (0, 0, 0)):
        with pytest.raises(ConfigError, match=r"a prefix must be one from 0 to"):
            SequenceLayout(Segments(lengths), prefixes=wrong)


def test_packed_loss_and_gradients_are_the_unpacked_ones(assert_close):
    lengths = [9, 1, 14, 6]
    config = tiny_config("MEM*E")
    documents = [tokens_for(config, n, seed=i) for i, n in enumerate(lengths)]

    def loss(model, tokens, layout):
        targets = torch.roll(tokens, -1)
        has_next = layout.segments.positions(tokens.device) < torch.repeat_interleave(
            torch.tensor(layout.segments.lengths) - 1, torch.tensor(layout.segments.lengths)
        )
        hidden = model.backbone(model.embed(tokens), layout).hidden
        return linear_cross_entropy(hidden, model.output_weight, targets, has_next.double()).total

    packed, alone = (tiny_model(config, dtype=torch.float64) for _ in range(2))
    total = loss(packed, torch.cat(documents), SequenceLayout.packed(lengths))
    total.backward()
    parts = [loss(alone, d, SequenceLayout.packed([len(d)])) for d in documents if len(d) > 1]
    sum(parts).backward()
    assert_close(total.detach(), sum(parts).detach(), FLOAT64)
    expected = named_gradients(alone)
    for name, gradient in named_gradients(packed).items():
        scale = expected[name].abs().max()
        assert_close(gradient / scale, expected[name] / scale, FLOAT64)


SIZES = {
    "tiny": tiny_config("MEM*E-ME"),
    # Wide enough that the matrix library has several kernels to choose from.
    "wider": tiny_config(
        "MEM*E",
        hidden_size=192,
        mamba={"mamba_num_heads": 12, "mamba_head_dim": 32, "ssm_state_size": 32},
        moe={"n_routed_experts": 16, "num_experts_per_tok": 4, "moe_intermediate_size": 192},
    ),
}


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("seed", range(6))
def test_a_document_cannot_change_a_bit_of_another_nor_of_its_gradients(size, seed):
    """Only the last token of the first document differs; it reroutes to other experts."""
    config = SIZES[size]
    model = tiny_model(config, seed)
    lengths = [11 + seed, 23, 4]
    layout = SequenceLayout.packed(lengths)
    first = slice(lengths[0], None)

    def logits_and_gradient(tokens):
        x = model.embed(tokens).detach().requires_grad_()
        logits = model.logits(model.backbone(x, layout).hidden)
        functional = torch.linspace(-1, 1, config.vocab_size)
        (gradient,) = torch.autograd.grad((logits * functional).sum(), x)
        return logits.detach(), gradient

    tokens = tokens_for(config, sum(lengths), seed=seed)
    before, gradient_before = logits_and_gradient(tokens)
    for step in range(1, 6):
        other = tokens.clone()
        other[lengths[0] - 1] = (other[lengths[0] - 1] + 13 * step) % config.vocab_size
        after, gradient_after = logits_and_gradient(other)
        assert not torch.equal(before[: lengths[0]], after[: lengths[0]])
        assert torch.equal(before[first], after[first])
        assert torch.equal(gradient_before[first], gradient_after[first])


@every_precision
@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("wanted", [[0], [4, 23, 32], [32, 0, 7], range(33), []])
@every_model
@torch.no_grad()
def test_what_is_wanted_of_a_call_are_rows_of_the_whole(
    assert_close, config, dtype, tolerance, wanted
):
    """And what is carried on does not depend on it."""
    model = tiny_model(config, dtype=dtype)
    tokens, wanted = tokens_for(config, 33), torch.tensor([*wanted], dtype=torch.int64)
    states = [model.new_state(3), model.new_state(3)]
    whole, some = (
        model.hidden_states(
            tokens, layout=state.layout([5, 19, 9]), state=state, output_indices=rows
        )
        for state, rows in zip(states, (None, wanted), strict=True)
    )
    assert_close(some, whole[wanted], tolerance)
    after = [model(tokens[:3, None], state=state) for state in states]
    assert torch.equal(*after)


@pytest.mark.usefixtures("poisoned_memory")
def test_recomputation_changes_neither_loss_nor_gradients():
    config = tiny_config("MEM*E-")
    tokens = tokens_for(config, 34)
    layout = SequenceLayout.packed([5, 20, 9])
    results = []
    for recompute in (False, True):
        model = tiny_model(config)
        hidden = model.backbone(model.embed(tokens), layout, recompute=recompute).hidden
        loss = hidden.square().sum()
        loss.backward()
        results.append({"loss": loss.detach(), **named_gradients(model)})
    plain, recomputed = results
    for name, value in plain.items():
        assert torch.equal(value, recomputed[name]), name


def test_within_a_call_gradients_flow_and_into_the_state_they_do_not(assert_close):
    """Truncated back-propagation: the second chunk's gradients take the first as a constant."""
    config = tiny_config("M*")
    model = tiny_model(config, dtype=torch.float64)
    tokens = tokens_for(config, 1, 12)
    state = model.new_state(1)
    model(tokens[:, :7], state=state)
    x = model.embed(tokens[0, 7:]).detach().requires_grad_()
    layout = state.layout([5])
    hidden = model.backbone(x, layout, state).hidden
    (carried,) = torch.autograd.grad(hidden.square().sum(), x)
    y = model.embed(tokens[0]).detach().requires_grad_()
    full = model.backbone(y, SequenceLayout.packed([12])).hidden[7:]
    (whole,) = torch.autograd.grad(full.square().sum(), y)
    assert_close(carried, whole[7:], FLOAT64)
    assert not any(
        buffer.requires_grad for buffer in (*state.layers[0].ssm_states, state.layers[1].keys)
    )


def test_the_residual_stream_is_measured_where_asked(assert_close):
    config = tiny_config("ME")
    model = tiny_model(config)
    tokens = tokens_for(config, 6)
    layout = SequenceLayout.packed([6])
    out = model.backbone(model.embed(tokens), layout, measure=True)
    x = model.embed(tokens)
    for layer, rms in zip(model.backbone.layers, out.residual_rms, strict=True):
        x, _ = layer(x, layout)
        assert_close(rms, x.square().mean().sqrt(), FLOAT32)
    assert len(out.routings) == 1
    assert model.backbone(model.embed(tokens), layout).residual_rms == []


def test_a_layout_that_does_not_fit_the_call_is_refused():
    model: LanguageModel = tiny_model("M*")
    tokens = tokens_for(model.config, 8)
    with pytest.raises(ValueError, match=r"shape \(8,\).*SequenceLayout\.packed"):
        model(tokens)
    with pytest.raises(ValueError, match="describes 7 tokens, but 8"):
        model(tokens, layout=SequenceLayout.packed([7]))
    state = model.new_state(2)
    first = state.layout([5, 3])
    model(tokens, layout=first, state=state)
    with pytest.raises(ValueError, match=r"sequences of \(0, 0\) tokens.*holds \(5, 3\)"):
        model(tokens, layout=first, state=state)
    with pytest.raises(ValueError, match="a slot of its own"):
        model(tokens, layout=state.layout([5, 3], [1, 1]), state=state)
    with pytest.raises(ValueError, match="a slot of its own"):
        model(tokens, layout=SequenceLayout.packed([5, 3]), state=state)
    with pytest.raises(ValueError, match="give the state too"):
        model(tokens, layout=state.layout([5, 3]))
    with pytest.raises(ValueError, match="2 sequences but 1 entries of slots"):
        SequenceLayout(first.segments, slots=(0,))
