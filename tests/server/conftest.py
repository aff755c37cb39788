"""One server for all tests that do not need one of their own."""

import pytest
from openai import OpenAI

from tests.server.serving import running, write_model


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def served(model_folder):
    with running(model_folder, prefix_interval=64) as server:
        yield server


@pytest.fixture(scope="session")
def client(served):
    with OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0, timeout=60) as client:
        yield client
