"""What `nemotron3 serve` makes of its options, up to the point where it would wait for clients."""

import json
import logging

import pytest

from nemotron3.cli.main import main
from nemotron3.inference.structured_output import grammar_compiler, grammar_library
from nemotron3.server import running
from tests.server.serving import write_model


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def serve(monkeypatch, model_folder):
    """Run the verb; returns the server that it would run."""
    servers = []
    monkeypatch.setattr(running, "serve", lambda server, *_, **__: servers.append(server))

    def serve(*options):
        command = ["serve", str(model_folder), "--port", "0", "--device", "cpu", *options]
        assert main(command) == 0
        return servers[-1]

    yield serve
    for server in servers:
        server.llm.close()


def test_what_compiles_forms_is_there_before_the_first_request(serve, monkeypatch):
    built = []
    monkeypatch.setattr(grammar_compiler, "_line_ends", lambda _: built.append(1) or frozenset())
    server = serve()
    assert built == [1]
    server.llm.prepare_grammars()
    assert built == [1]


def test_defaults_of_the_model_are_said_and_can_be_left_out(serve, model_folder, capsys):
    file = model_folder / "generation_config.json"
    before = file.read_text()
    file.write_text(json.dumps({"temperature": 0.6, "max_new_tokens": 9}))
    try:
        params = serve().llm.get_default_sampling_params()
        assert (params.temperature, params.max_tokens) == (0.6, 9)
        assert "gives defaults: temperature 0.6, max_tokens 9" in capsys.readouterr().err
        params = serve("--generation-config", "none").llm.get_default_sampling_params()
        assert (params.temperature, params.max_tokens) == (1.0, None)
        assert "defaults" not in capsys.readouterr().err
    finally:
        file.write_text(before)


def test_pages_elsewhere_are_named_between_commas(serve, capsys):
    server = serve("--allowed-origins", "https://a.example, http://localhost:3000,")
    assert server.app.allow_origins == ("https://a.example", "http://localhost:3000")
    assert "every page" not in capsys.readouterr().err
    serve("--allowed-origins", "*")
    assert "every page that a browser on this network opens" in capsys.readouterr().err


def test_without_what_compiles_forms_it_serves_and_says_so(serve, monkeypatch, capsys):
    def missing(name):
        raise ImportError(name)

    monkeypatch.setattr(grammar_library, "import_module", missing)
    assert serve().llm.is_alive
    assert "structured outputs will be refused" in capsys.readouterr().err
    assert not logging.getLogger("nemotron3.server").handlers


def test_weights_are_updated_only_where_a_folder_is_named(serve, tmp_path, monkeypatch):
    def addresses(server):
        return {getattr(route, "path", None) for route in server.api.routes}

    assert "/update_weights" not in addresses(serve("--api-key", "secret"))
    monkeypatch.setenv("NEMOTRON3_API_KEY", "secret")
    assert "/update_weights" in addresses(serve("--enable-weight-updates", str(tmp_path)))
