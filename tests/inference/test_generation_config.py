"""Defaults of sampling that a model's directory brings along."""

import json

import pytest

from nemotron3 import LLM, SamplingParams
from nemotron3.errors import CheckpointError, ConfigError
from nemotron3.inference.config import EngineConfig
from nemotron3.inference.generation_config import GenerationDefaults, generation_defaults
from nemotron3.models.huggingface import read_directory
from nemotron3.models.nemotron_h import LanguageModel
from tests.inference.texts import text_model, tokenizer

SAID = {
    "temperature": 0.0,
    "top_p": 0.9,
    "top_k": 7,
    "min_p": None,
    "repetition_penalty": 1.5,
    "max_new_tokens": 5,
    "do_sample": True,
    "eos_token_id": [2, 9],
}
SMALL = EngineConfig(max_num_seqs=2, page_size=8, prefix_interval=16, max_model_len=60)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tokenizer().save(folder)
    text_model().save_pretrained(folder)
    return folder


def load(folder, said=SAID, **options):
    (folder / "generation_config.json").write_text(json.dumps(said))
    return LLM(folder, config=SMALL, device="cpu", **options)


def read(folder, said, **options):
    text = said if isinstance(said, str) else json.dumps(said)
    text_model().save_pretrained(folder)
    (folder / "generation_config.json").write_text(text)
    return generation_defaults(read_directory(folder), vocab_size=100, **options)


def test_what_the_file_says_is_how_a_model_is_sampled(folder):
    llm = load(folder)
    expected = SamplingParams(
        temperature=0.0, top_p=0.9, top_k=7, repetition_penalty=1.5, max_tokens=5
    )
    assert llm.get_default_sampling_params() == expected
    unasked = llm.generate(["the quick"])[0].outputs[0].token_ids
    assert len(unasked) == 5
    assert unasked == llm.generate(["the quick"], expected)[0].outputs[0].token_ids


def test_none_leaves_the_defaults_out_and_not_the_end_tokens(folder):
    llm = load(folder, generation_config="none")
    assert llm.get_default_sampling_params() == SamplingParams()
    bias = {9: 100.0}
    for each in (llm, load(folder)):
        greedy = SamplingParams(temperature=0, logit_bias=bias, max_tokens=4)
        assert each.generate(["the quick"], greedy)[0].outputs[0].token_ids == (9,)
    without = load(folder, {})
    greedy = SamplingParams(temperature=0, logit_bias=bias, max_tokens=4)
    assert without.generate(["the quick"], greedy)[0].outputs[0].token_ids == (9,) * 4


def test_a_default_length_ends_where_the_context_does(folder):
    llm = load(folder, {"max_new_tokens": 10_000, "temperature": 0.0})
    prompt = llm.tokenizer.encode("the quick")
    answer = llm.generate([prompt], None)[0].outputs[0]
    assert len(prompt) + len(answer.token_ids) <= 60


def test_a_request_that_wants_more_tokens_than_the_default_gets_them(folder):
    llm = load(folder)
    prompt = llm._frontend.text_prompt("the quick")
    params = llm.with_default_length(prompt, SamplingParams(min_tokens=8))
    assert params.max_tokens == 8
    assert llm.with_default_length(prompt, SamplingParams(max_tokens=3)).max_tokens == 3


def test_a_directory_without_the_file_has_no_defaults(tmp_path):
    text_model().save_pretrained(tmp_path)
    (tmp_path / "generation_config.json").unlink()
    for companions in (None, read_directory(tmp_path)):
        nothing = generation_defaults(companions, vocab_size=100)
        assert nothing == GenerationDefaults()
        assert nothing.described() == ""


def test_a_model_in_memory_is_sampled_as_the_directory_it_was_loaded_from_says(folder):
    from_path = load(folder)
    model = LanguageModel.from_pretrained(folder)
    llm = LLM(model, tokenizer=tokenizer(), config=SMALL)
    assert llm.get_default_sampling_params() == from_path.get_default_sampling_params()
    greedy = SamplingParams(temperature=0, logit_bias={9: 100.0}, max_tokens=4)
    assert llm.generate(["the quick"], greedy)[0].outputs[0].token_ids == (9,)


def test_every_end_token_of_the_configuration_ends_an_answer(folder, tmp_path):
    LanguageModel.from_pretrained(folder).save_pretrained(tmp_path)
    (tmp_path / "generation_config.json").unlink()
    record = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(record | {"eos_token_id": [2, 9]}))
    llm = LLM(tmp_path, config=SMALL, device="cpu")
    greedy = SamplingParams(temperature=0, logit_bias={9: 100.0}, max_tokens=4)
    assert llm.generate(["the quick"], greedy)[0].outputs[0].token_ids == (9,)


BAD = {
    "text": ({"temperature": "warm"}, "temperature is 'warm'; it must be a number"),
    "a truth": ({"top_p": True}, "top_p is True; it must be a number"),
    "too much": ({"top_p": 1.5}, "top_p is 1.5; it must be above 0 and at most 1"),
    "no number": ('{"temperature": NaN}', "temperature is nan; it must be 0 to 100"),
    "half a token": ({"top_k": 2.5}, "top_k is 2.5; it must be a whole number"),
    "no tokens": ({"max_new_tokens": 0}, "max_new_tokens is 0; it must be at least 1"),
    "a penalty of nothing": ({"repetition_penalty": 0}, "repetition_penalty is 0; it must be abo"),
    "a list": ({"min_p": [0.1]}, r"min_p is \[0.1\]; it must be a number"),
}


@pytest.mark.parametrize(("said", "error"), BAD.values(), ids=BAD.keys())
def test_a_value_that_cannot_be_is_named_with_its_file(tmp_path, said, error):
    with pytest.raises(ConfigError, match=r"generation_config\.json: " + error) as raised:
        read(tmp_path, said)
    assert str(tmp_path) in str(raised.value)
    assert "generation_config='none'" in str(raised.value)
    assert read(tmp_path, said, source="none") == GenerationDefaults()


@pytest.mark.parametrize("source", ["auto", "none"])
@pytest.mark.parametrize("eos", [100, -1, "2", [2, 100], [True], {}])
def test_an_end_token_that_is_none_is_named(tmp_path, eos, source):
    with pytest.raises(ConfigError, match=r"generation_config\.json: eos_token_id has .*0 to 99"):
        read(tmp_path, {"eos_token_id": eos}, source=source)


@pytest.mark.parametrize(("said", "error"), [("{", "is not JSON"), ("[1]", "no JSON object")])
def test_a_file_that_is_no_object_is_named(tmp_path, said, error):
    with pytest.raises(CheckpointError, match=r"generation_config\.json.* " + error):
        read(tmp_path, said)


def test_another_source_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="generation_config is 'vllm'; it must be 'auto' or"):
        read(tmp_path, {}, source="vllm")
