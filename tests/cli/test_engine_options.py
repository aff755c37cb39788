"""Options of `serve` and `chat`, as the engine's own configuration."""

import argparse

import pytest

from nemotron3.cli.engine_options import add_engine_options, engine_config
from nemotron3.errors import ConfigError
from nemotron3.inference.config import EngineConfig
from nemotron3.models.cache.state_precision import StatePrecision


def config(*words):
    parser = argparse.ArgumentParser()
    add_engine_options(parser)
    return engine_config(parser.parse_args(["runs/tiny/model", *words]))


def test_without_options_it_is_the_engines_default():
    assert config() == EngineConfig()


@pytest.mark.parametrize(
    ("words", "changes"),
    [
        ("--max-num-seqs 3 --max-draft-tokens 0", {"max_num_seqs": 3, "max_draft_tokens": 0}),
        ("--kv-cache-mib 5", {"kv_cache_bytes": 5 << 20}),
        ("--mamba-ssm-cache-dtype int8", {"state": StatePrecision(ssm="int8")}),
        (
            "--mamba-ssm-cache-dtype float16 --mamba-cache-philox-rounds 7 --kv-cache-dtype fp8",
            {"state": StatePrecision(ssm="float16", philox_rounds=7, keys="float8")},
        ),
        ("--kv-cache-dtype bfloat16", {"state": StatePrecision(keys="bfloat16")}),
        ("--kv-cache-dtype auto", {}),
        ("--activations int8", {"activations": "int8"}),
        ("--activations auto", {}),
    ],
)
def test_an_option_is_a_field(words, changes):
    assert config(*words.split()) == EngineConfig(**changes)


def test_an_option_without_effect_is_refused():
    with pytest.raises(ConfigError, match="philox_rounds is 7, which does nothing"):
        config("--mamba-cache-philox-rounds", "7")
