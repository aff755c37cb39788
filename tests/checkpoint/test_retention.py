import pytest

from nemotron3.checkpoint.retention import RetentionConfig, steps_to_delete
from nemotron3.errors import ConfigError


@pytest.mark.parametrize(
    ("config", "deleted"),
    [
        (RetentionConfig(), [10, 20, 30]),
        (RetentionConfig(keep_last=1), [10, 20, 30, 40]),
        (RetentionConfig(keep_last=9), []),
        (RetentionConfig(keep_last=1, keep_every_steps=20), [10, 30]),
        (RetentionConfig(keep_last=2, keep_every_steps=7), [10, 20, 30]),
    ],
)
def test_the_newest_and_the_multiples_stay(config, deleted):
    assert steps_to_delete([50, 10, 30, 20, 40], config) == deleted


@pytest.mark.parametrize("fields", [{"keep_last": 0}, {"keep_every_steps": 0}])
def test_keeping_nothing_is_refused(fields):
    with pytest.raises(ConfigError, match="must be 1 or more"):
        RetentionConfig(**fields)
