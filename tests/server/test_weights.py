"""Weights replaced over HTTP: by whom, from where, and what the answers say of it."""

import threading

import pytest

from nemotron3.errors import ConfigError
from nemotron3.models.nemotron_h import LanguageModel
from nemotron3.server.app import ServerSettings
from tests.server.serving import MODEL, running
from tests.tiny import randomized

KEY = {"Authorization": "Bearer secret"}
ADDRESSES = [
    ("POST", "/update_weights"), ("POST", "/pause"), ("POST", "/resume"),
    ("GET", "/weight_version"), ("GET", "/is_paused"),
]  # fmt: skip


@pytest.fixture(scope="module")
def folder(model_folder, tmp_path_factory):
    """A folder for weights with a model in it, and everything that must not be read from it."""
    outside = tmp_path_factory.mktemp("outside")
    folder = tmp_path_factory.mktemp("weights")
    model = LanguageModel.from_pretrained(model_folder)
    randomized(model, 5).save_pretrained(folder / "step-1")
    model.save_pretrained(outside / "secret")
    (folder / "link").symlink_to(outside / "secret")
    (folder / "inner").symlink_to(folder / "step-1")
    (folder / "linked").mkdir()
    for file in (folder / "step-1").iterdir():
        target = outside / "secret" if file.suffix == ".safetensors" else folder / "step-1"
        (folder / "linked" / file.name).symlink_to(target / file.name)
    (folder / "circle").symlink_to(folder / "circle")
    (folder / "file").write_text("no directory")
    return folder


@pytest.fixture(scope="module")
def trained(model_folder, folder):
    with running(model_folder, api_key="secret", weights_folder=folder) as server:
        yield server


def complete(server, **body):
    body = {"model": MODEL, "prompt": "Hello there", "max_tokens": 6, "temperature": 0, **body}
    return server.post("/v1/completions", body | {"return_token_ids": True}, headers=KEY)


def test_without_a_folder_there_are_no_such_addresses(served):
    for method, path in ADDRESSES:
        options = {"json": {}} if method == "POST" else {}
        assert served.send(method, path, **options).status_code == 404


def test_every_address_wants_the_key(trained):
    for method, path in ADDRESSES:
        options = {"json": {}} if method == "POST" else {}
        assert trained.send(method, path, **options).status_code == 401


def test_a_folder_wants_a_key_and_has_to_be_there(folder):
    with pytest.raises(ConfigError, match=r"no API key.*set api_key"):
        ServerSettings(weights_folder=folder)
    with pytest.raises(ConfigError, match=r"no API key.*set api_key"):
        ServerSettings(weights_folder=folder, api_key="")
    with pytest.raises(ConfigError, match="is no directory"):
        ServerSettings(weights_folder=folder / "none", api_key="a")


@pytest.mark.parametrize(
    "path",
    [
        "", ".", "..", "../secret", "step-1/../..", "/etc", "link", "linked", "circle", "file",
        "none", "a\x00b", "step-1/model.safetensors",
    ],
)  # fmt: skip
def test_nothing_outside_the_folder_is_read(trained, folder, path):
    version = trained.llm.weight_version
    for given in {path, str(folder / path) if path and "\x00" not in path else path}:
        answer = trained.post("/update_weights", {"model_path": given}, headers=KEY)
        assert answer.status_code == 400, answer.text
        assert answer.json()["error"]["param"] == "model_path"
    assert trained.llm.weight_version == version


def test_weights_are_replaced_and_tokens_tell_which_they_came_from(trained, folder):
    before = trained.llm.weight_version
    first = complete(trained).json()["choices"][0]
    assert first["weight_versions"] == [before] * 6
    for path in ("step-1", str(folder / "step-1"), "inner"):
        answer = trained.post("/update_weights", {"model_path": path}, headers=KEY)
        assert answer.status_code == 200, answer.text
        before += 1
        assert answer.json() == {"weight_version": before}
    assert trained.get("/weight_version", headers=KEY).json() == {"weight_version": before}
    second = complete(trained).json()["choices"][0]
    assert second["weight_versions"] == [before] * 6
    assert second["token_ids"] != first["token_ids"]
    streamed = complete(trained, stream=True).text
    assert f'"weight_versions":[{before}' in streamed.replace(": ", ":")
    stale = {"model_path": "step-1", "weight_version": before}
    answer = trained.post("/update_weights", stale, headers=KEY)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "weight_version"
    wrong = trained.post("/update_weights", {"model_path": "step-1", "running": "x"}, headers=KEY)
    assert (wrong.status_code, wrong.json()["error"]["param"]) == (400, "running")
    named = trained.post("/update_weights", stale | {"weight_version": before + 9}, headers=KEY)
    assert named.json() == {"weight_version": before + 9}


def test_weights_that_do_not_fit_are_refused(trained, folder):
    (folder / "bad").mkdir()
    for file in (folder / "step-1").iterdir():
        content = file.read_bytes()
        short = content[:-5] if file.suffix == ".safetensors" else content
        (folder / "bad" / file.name).write_bytes(short)
    answer = trained.post("/update_weights", {"model_path": "bad"}, headers=KEY)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "model_path")
    assert complete(trained).status_code == 200


def test_a_paused_server_holds_answers_until_it_resumes(trained):
    assert trained.post("/pause", {}, headers=KEY).json() == {"is_paused": True}
    assert trained.get("/is_paused", headers=KEY).json() == {"is_paused": True}
    answers = []
    waiting = threading.Thread(target=lambda: answers.append(complete(trained)))
    waiting.start()
    waiting.join(0.3)
    assert waiting.is_alive()
    trained.post("/update_weights", {"model_path": "step-1"}, headers=KEY)
    version = trained.llm.weight_version
    assert trained.post("/resume", {}, headers=KEY).json() == {"is_paused": False}
    waiting.join(60)
    (answer,) = answers
    assert answer.json()["choices"][0]["weight_versions"] == [version] * 6
