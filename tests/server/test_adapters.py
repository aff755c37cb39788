"""A model and adapters of it, served side by side: each answers as its merged model would alone."""

import threading

import pytest
from openai import NotFoundError, OpenAI

from nemotron3.errors import CheckpointError, ConfigError
from nemotron3.inference.async_llm import AsyncLLM
from nemotron3.inference.config import EngineConfig
from nemotron3.inference.llm import LLM
from nemotron3.inference.requests import SamplingParams
from nemotron3.inference.served_adapters import load_served
from nemotron3.models.lora import LoRAConfig, add_lora, write_adapter
from nemotron3.models.nemotron_h import LanguageModel
from nemotron3.recipes.adapters import merge_adapter_directory
from nemotron3.server.app import ServerSettings, create_app
from nemotron3.text import Tokenizer
from tests.models.lora.adapted import with_change
from tests.server.serving import MODEL, running

CONFIGS = {
    "narrow": LoRAConfig(rank=2, targets=("q_proj", "in_proj")),
    "wide": LoRAConfig(rank=4, alpha=4.0, targets=("all-linear", "out_proj", "lm_head")),
}
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}: {{ message.content }}<|im_end|>"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant: {% endif %}"
)
QUESTIONS = [[{"role": "user", "content": text}] for text in ("Hello", "why? Paris", "true false")]


@pytest.fixture(scope="module")
def adapters(model_folder, tmp_path_factory):
    folders = {}
    for seed, (name, config) in enumerate(CONFIGS.items()):
        model = LanguageModel.from_pretrained(model_folder)
        add_lora(model, config, seed=seed)
        folders[name] = tmp_path_factory.mktemp(name)
        write_adapter(folders[name], with_change(model, seed=seed), config, base="base")
    # The second one came from a tuning run that changed the template.
    tokenizer = Tokenizer.from_directory(model_folder)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save(folders["wide"])
    return folders


@pytest.fixture(scope="module")
def served(model_folder, adapters):
    with running(model_folder, adapters=adapters, prefix_interval=64) as server:
        yield server


@pytest.fixture(scope="module")
def client(served):
    with OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0, timeout=60) as client:
        yield client


@pytest.fixture(scope="module")
def expected(model_folder, adapters, tmp_path_factory):
    """Log-probabilities of every model's answers, each alone and read from its directory."""
    folders = {MODEL: model_folder}
    for name, adapter in adapters.items():
        folders[name] = tmp_path_factory.mktemp("merged") / name
        merge_adapter_directory(model_folder, adapter, folders[name])
    config = EngineConfig(prefix_interval=64)
    return {
        name: answers(LLM(folder, device="cpu", config=config)) for name, folder in folders.items()
    }


PARAMS = SamplingParams(temperature=0.0, max_tokens=12, logprobs=0)


def answers(llm):
    outputs = [llm.chat(question, PARAMS)[0].outputs[0] for question in QUESTIONS]
    return [[entry.logprob for entry in output.logprobs] for output in outputs]


def asked(client, name):
    found = []
    for question in QUESTIONS:
        answer = client.chat.completions.create(
            model=name, messages=question, temperature=0.0, max_tokens=12, logprobs=True
        )
        assert answer.model == name
        found.append([entry.logprob for entry in answer.choices[0].logprobs.content])
    return found


def test_the_models_are_listed_with_their_parent(client, adapters):
    cards = {card.id: card.model_dump() for card in client.models.list().data}
    assert list(cards) == [MODEL, "narrow", "wide"]
    assert cards[MODEL]["parent"] is None
    for name, folder in adapters.items():
        assert (cards[name]["parent"], cards[name]["root"]) == (MODEL, str(folder))
        assert cards[name]["max_model_len"] == 4096
        assert client.models.retrieve(name).id == name


def test_each_answers_as_its_merged_model_alone(served, client, expected):
    """To the bit, also the base model, though all are asked at the same time."""
    found = {}
    threads = [
        threading.Thread(target=lambda name=name: found.update({name: asked(client, name)}))
        for name in expected
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for name, parts in expected.items():
        assert found[name] == parts, name
    assert len({str(parts) for parts in found.values()}) == 3


@pytest.mark.parametrize("path", ["chat/completions", "completions", "responses"])
def test_every_endpoint_chooses_by_model(served, path):
    body = {
        "chat/completions": {"messages": QUESTIONS[0]},
        "completions": {"prompt": "Hello"},
        "responses": {"input": "Hello"},
    }[path]
    length = "max_output_tokens" if path == "responses" else "max_tokens"
    for name in (MODEL, *CONFIGS):
        answer = served.post(f"/v1/{path}", body | {"model": name, length: 2})
        assert answer.status_code == 200, answer.text
        assert answer.json()["model"] == name
    answer = served.post(f"/v1/{path}", body | {length: 2})
    assert answer.json()["model"] == MODEL


def test_another_model_is_refused_by_name(client):
    with pytest.raises(NotFoundError, match="this server has 'tiny', 'narrow', 'wide'"):
        client.chat.completions.create(model="gpt", messages=QUESTIONS[0])
    with pytest.raises(NotFoundError):
        client.models.retrieve("gpt")


def test_an_adapter_has_its_own_template(served):
    texts = {
        name: served.post("/tokenize", {"model": name, "messages": QUESTIONS[0]}).json()["tokens"]
        for name in (MODEL, *CONFIGS)
    }
    assert texts[MODEL] == texts["narrow"]
    assert texts["wide"] != texts[MODEL]


def test_metrics_are_those_of_all_engines(served, client):
    def generated():
        (line,) = (
            line
            for line in served.get("/metrics").text.splitlines()
            if line.startswith("nemotron3_generated_tokens_total")
        )
        return float(line.rpartition(" ")[2])

    before = generated()
    for name in (MODEL, *CONFIGS):
        served.post("/v1/completions", {"model": name, "prompt": "Q", "max_tokens": 3,
                                        "ignore_eos": True})  # fmt: skip
    assert generated() == before + 9


def test_memory_is_that_of_changed_weights(model_folder, adapters):
    config = EngineConfig(max_num_seqs=2, max_model_len=64)
    base, served = load_served(model_folder, adapters, config=config, device="cpu")
    try:
        model = base._engine.model
        for name, (engine, _, merged_bytes) in served.items():
            own = engine._engine.model
            changed = [
                a.nbytes
                for a, b in zip(own.parameters(), model.parameters(), strict=True)
                if a is not b
            ]
            assert merged_bytes == sum(changed) > 0, name
        assert served["narrow"].merged_bytes < served["wide"].merged_bytes
    finally:
        create_app(base, ServerSettings(), served).close()


def test_what_cannot_be_served_is_refused(model_folder, adapters, tmp_path):
    with pytest.raises(CheckpointError, match=r"holds no adapter_config.json"):
        load_served(model_folder, {"a": tmp_path}, device="cpu")
    llm = AsyncLLM(model_folder, device="cpu", config=EngineConfig(max_model_len=64))
    try:
        with pytest.raises(ConfigError, match="an adapter named 'tiny', and so is the model"):
            create_app(llm, ServerSettings(served_model_name=MODEL), {MODEL: None})
        allowed = ServerSettings(api_key="key", weights_folder=tmp_path)
        with pytest.raises(ConfigError, match="which share the model's weights"):
            create_app(llm, allowed, {"a": None})
    finally:
        llm.close()
