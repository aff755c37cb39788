"""Weight updates during answers: the version that computes each token and log-probability."""

import copy

import pytest
import torch

from nemotron3.errors import CheckpointError, ConfigError
from nemotron3.inference.config import EngineConfig
from nemotron3.inference.engine import Engine
from nemotron3.inference.requests import SamplingParams
from nemotron3.inference.sequences import EngineRequest
from nemotron3.models.precision import convert_weights
from nemotron3.ops.weights import FORMATS
from tests.tiny import WHOLE_BLOCKS, tiny_config, tiny_model, tokens_for
from tests.tolerances import DECODE

PATTERNS = ["MM", "**", "EE", "--", "MEM*E-"]
SAMPLED = SamplingParams(
    max_tokens=24, temperature=0.7, seed=1, logprobs=1, prompt_logprobs=0, ignore_eos=True
)


def engine_for(model, **changes):
    limits = {"max_num_seqs": 2, "page_size": 4, "prefix_interval": 4, "max_model_len": 96}
    return Engine(model, EngineConfig(**(limits | changes)))


def ask(engine, prompt, params=SAMPLED, name="a"):
    engine.add(EngineRequest(request_id=name, prompt=tuple(prompt), params=params))


def run(engine, *, until=None):
    """The deltas up to the end, or up to a number of tokens."""
    steps = []
    while engine.has_work:
        steps += engine.step()
        if until is not None and sum(len(step.tokens) for step in steps) >= until:
            break
    return steps


def told(steps):
    """Tokens, their versions, and the entries of answer and prompt."""
    tokens = [token for step in steps for token in step.tokens]
    versions = [step.weight_version for step in steps for _ in step.tokens]
    entries = [entry for step in steps for entry in step.logprobs]
    assert [entry.token for entry in entries] == tokens
    assert [entry.weight_version for entry in entries] == versions
    report = next(step.prompt for step in steps if step.prompt is not None)
    return tokens, versions, entries, report.logprobs


@torch.no_grad()
def forward(model, tokens):
    """Log-probabilities of each token but the first, by one pass over all of them."""
    return scored(model(torch.tensor([tokens]))[0, :-1], tokens[1:])


@torch.no_grad()
def carried(old, new, tokens, cut):
    """The same, where the state of the first `cut` tokens was computed by the old weights."""
    state = old.new_state(slots=1)
    parts = [
        model(torch.tensor([part]), state=state)[0]
        for model, part in ((old, tokens[:cut]), (new, tokens[cut:]))
    ]
    return scored(torch.cat(parts)[:-1], tokens[1:])


def scored(logits, tokens):
    return logits.log_softmax(-1).gather(-1, torch.tensor(tokens)[:, None])[:, 0].tolist()


def assert_close(entries, expected):
    for entry, wanted in zip(entries, expected, strict=True):
        assert abs(entry.logprob - wanted) < DECODE


def given(model, how, tmp_path):
    if how == "directory":
        model.save_pretrained(tmp_path / "new")
        return tmp_path / "new"
    if how == "tensors":
        return ((name, tensor) for name, tensor in model.state_dict().items())
    return model.state_dict()


@pytest.mark.parametrize("drafts", [0, 2])
@pytest.mark.parametrize("running", ["keep", "recompute"])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_an_answer_over_an_update_is_scored_by_the_weights_it_names(pattern, running, drafts):
    config = tiny_config(pattern + "/*E")
    ours, old, new = tiny_model(config), tiny_model(config), tiny_model(config, seed=5)
    engine = engine_for(ours, max_draft_tokens=drafts, adapts_drafts=False)
    prompt = tokens_for(config, 13).tolist()
    ask(engine, prompt)
    steps = run(engine, until=7)
    before = sum(len(step.tokens) for step in steps)
    assert engine.update_weights(new.state_dict(), running=running) == 1
    steps += run(engine)
    answer, versions, entries, scores = told(steps)
    assert len(answer) == 24
    assert versions == [0] * before + [1] * (24 - before)
    mixed = [step.continues_old_states for step in steps for _ in step.tokens]
    assert mixed == [False] * before + [running == "keep"] * (24 - before)
    whole = [*prompt, *answer]
    by_old = forward(old, whole)
    if running == "recompute":
        by_new = forward(new, whole)
    else:  # the new weights process the last token
        by_new = carried(old, new, whole, 13 + before - 1)
    assert_close(scores[1:], by_old[:12])
    assert_close(entries, by_old[12 : 12 + before] + by_new[12 + before :])
    # The recorded steps have the new weights, whole: also what is derived from them.
    ask(engine, prompt, name="b")
    again, versions, entries, scores = told(run(engine))
    assert_close([*scores[1:], *entries], forward(new, [*prompt, *again]))
    assert set(versions) == {1}


@pytest.mark.parametrize("weights", FORMATS)
@pytest.mark.parametrize("how", ["directory", "tensors"])
def test_an_engine_of_quantized_weights_is_one_forward_pass_and_takes_plain_ones(
    tmp_path, weights, how
):
    """Prompt, recorded steps and drafts, before and after an update with plain weights."""
    config = tiny_config("MEM*E-/*E", **WHOLE_BLOCKS)
    model = convert_weights(tiny_model(config), weights)
    engine = engine_for(model, max_draft_tokens=2, adapts_drafts=False)
    prompt = tokens_for(config, 13).tolist()
    for version, seed in enumerate((0, 5)):
        plain = tiny_model(config, seed=seed)
        if version:
            engine.update_weights(given(plain, how, tmp_path))
        ask(engine, prompt, name=str(version))
        answer, versions, entries, scores = told(run(engine))
        assert set(versions) == {version}
        expected = forward(convert_weights(plain, weights), [*prompt, *answer])
        assert_close([*scores[1:], *entries], expected)


@pytest.mark.parametrize(
    ("how", "error", "said"),
    [
        ("directory", CheckpointError, "'lm_head.weight' holds values that are not finite"),
        ("tensors", ConfigError, r"weights\['lm_head.weight'\] .* not finite, which int8"),
    ],
)
def test_what_a_format_cannot_express_is_refused_and_changes_nothing(tmp_path, how, error, said):
    model = convert_weights(tiny_model("E"), "int8")
    before = copy.deepcopy(model.state_dict())
    broken = tiny_model("E", seed=5)
    broken.state_dict()["lm_head.weight"][0, 0] = torch.inf
    with pytest.raises(error, match=said):
        engine_for(model).update_weights(given(broken, how, tmp_path))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("running", ["keep", "recompute"])
@pytest.mark.parametrize("pattern", ["MM", "MEM*E-"])
def test_a_prompt_over_an_update_is_scored_by_the_weights_it_names(pattern, running):
    config = tiny_config(pattern + "/*E")
    ours, old, new = tiny_model(config), tiny_model(config), tiny_model(config, seed=5)
    engine = engine_for(ours, max_num_batched_tokens=4)
    prompt = tokens_for(config, 13).tolist()
    ask(engine, prompt)
    for _ in range(2):
        assert engine.step() == []
    engine.update_weights(new.state_dict(), running=running)
    answer, versions, entries, scores = told(run(engine))
    assert set(versions) == {1}
    whole = [*prompt, *answer]
    if running == "recompute":
        expected, by_old = forward(new, whole), 0
    else:
        expected, by_old = carried(old, new, whole, 8), 8
    assert_close([*scores[1:], *entries], expected)
    assert [entry.weight_version for entry in scores[1:]] == [0] * by_old + [1] * (12 - by_old)


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("running", ["keep", "recompute"])
def test_nothing_of_old_weights_is_found_by_what_comes_later(running, n):
    """Neither cached prefixes, nor shared prompts, nor states of both versions are reused."""
    config = tiny_config("MEM*E/*E")
    ours, new = tiny_model(config), tiny_model(config, seed=5)
    engine = engine_for(ours, max_num_seqs=2)
    prompt = tokens_for(config, 21).tolist()
    params = SamplingParams(n=n, max_tokens=9, temperature=0.7, seed=1, logprobs=0, ignore_eos=True)
    ask(engine, prompt, params)
    steps = run(engine, until=3)
    hits = engine.stats().prefix_hits
    engine.update_weights(new.state_dict(), running=running)
    steps += run(engine)
    assert engine.stats().prefix_hits == hits or n > 1
    whole = [*prompt, *(t for step in steps if step.index == 0 for t in step.tokens), 5]
    ask(engine, whole, SAMPLED, name="b")
    assert_by(new, whole, run(engine))
    late = [step for step in steps if step.index == n - 1 and n == 3]
    if late:  # it had not begun
        assert {step.weight_version for step in late} == {1}
        answer = [token for step in late for token in step.tokens]
        entries = [entry for step in late for entry in step.logprobs]
        assert_close(entries, forward(new, [*prompt, *answer])[20:])


def assert_by(model, prompt, steps):
    answer, _, entries, scores = told(steps)
    assert_close([*scores[1:], *entries], forward(model, [*prompt, *answer]))


@pytest.mark.parametrize("how", ["names", "tensors", "directory"])
def test_weights_come_by_name_or_from_a_directory_into_the_same_memory(how, tmp_path):
    config = tiny_config("MEM*E/*E")
    ours, new = tiny_model(config), tiny_model(config, seed=5)
    engine = engine_for(ours)
    prompt = tokens_for(config, 9).tolist()
    ask(engine, prompt)
    run(engine)
    where = [tensor.data_ptr() for tensor in ours.state_dict().values()]
    assert engine.update_weights(given(new, how, tmp_path), version=7) == 7
    assert engine.weight_version == 7
    assert [tensor.data_ptr() for tensor in ours.state_dict().values()] == where
    for name, tensor in new.state_dict().items():
        assert torch.equal(ours.state_dict()[name], tensor), name
    ask(engine, prompt)
    assert_by(new, prompt, run(engine))


def test_what_does_not_fit_is_refused_and_nothing_is_written(tmp_path):
    config = tiny_config("MEM*E/*E")
    ours, new = tiny_model(config), tiny_model(config, seed=5)
    before = copy.deepcopy(ours.state_dict())
    engine = engine_for(ours)
    good = new.state_dict()
    name, last = "backbone.norm_f.weight", list(good)[-1]
    tiny_model(tiny_config("MEM*E/*E", layer_norm_epsilon=1e-3)).save_pretrained(tmp_path / "eps")
    new.save_pretrained(tmp_path / "cut")
    file = tmp_path / "cut" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-9])
    cases = [
        ({n: t for n, t in good.items() if n != last}, ConfigError, f"lack 1 tensors.*{last}"),
        (good | {"more": torch.ones(1)}, ConfigError, "more than the model: 1.*'more'"),
        (good | {last: torch.ones(3, 5)}, ConfigError, r"shape \(3, 5\) and the model's has"),
        (good | {last: good[last].long()}, ConfigError, "dtype torch.int64"),
        (good | {last: good[last].to("meta")}, ConfigError, "not a tensor with values"),
        (iter([*good.items(), (name, good[name])]), ConfigError, f"have '{name}' twice"),
        (tmp_path / "eps", ConfigError, r"layer_norm_epsilon is 0\.001.*served model is 1e-05"),
        (tmp_path / "cut", CheckpointError, "model.safetensors"),
        (tmp_path / "none", CheckpointError, "does not exist"),
    ]
    for weights, error, message in cases:
        with pytest.raises(error, match=message):
            engine.update_weights(weights)
    with pytest.raises(ConfigError, match="version is 0, and the weights have version 0 already"):
        engine.update_weights(good, version=0)
    with pytest.raises(ConfigError, match="running is 'stop'; it must be one of recompute, keep"):
        engine.update_weights(good, running="stop")
    assert engine.weight_version == 0
    for key, tensor in ours.state_dict().items():
        assert torch.equal(tensor, before[key]), key
    ask(engine, [1, 2, 3])
    assert len(run(engine)) > 0


def test_half_written_weights_are_never_computed_with(monkeypatch):
    """Only memory or a disk can make writing fail half-way; the engine then reports an error."""
    config = tiny_config("MEM*E/*E")
    ours, new = tiny_model(config), tiny_model(config, seed=5)
    engine = engine_for(ours)
    ask(engine, [1, 2, 3])
    copy_, calls = torch.Tensor.copy_, []

    def failing(target, source, *rest):
        calls.append(1)
        if len(calls) == 5:
            raise OSError("the disk is gone")
        return copy_(target, source, *rest)

    with monkeypatch.context() as patched:
        patched.setattr(torch.Tensor, "copy_", failing)
        with pytest.raises(OSError, match="the disk is gone"):
            engine.update_weights(new.state_dict())
    with pytest.raises(CheckpointError, match=r"half written.*call it again"):
        engine.step()
    engine.update_weights(new.state_dict())
    assert_by(new, [1, 2, 3], run(engine))


def test_weights_of_another_dtype_are_written_as_the_model_keeps_them():
    config = tiny_config("MEM*E/*E")
    ours, new = tiny_model(config), tiny_model(config, seed=5, dtype=torch.float64)
    engine = engine_for(ours)
    engine.update_weights(new.state_dict())
    for name, tensor in ours.state_dict().items():
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, new.state_dict()[name].float())
