"""Alarms: each rings at its threshold, says so once, and is logged at every update."""

import math
import re

import pytest

from nemotron3.errors import ConfigError
from nemotron3.rl.alarms import AlarmConfig, Alarms

ERROR = "policy/logprob_error_current"
SOUND = {
    ERROR: 2e-6,
    "policy/kept": 1.0,
    "rollouts/played": 10.0,
    "rollouts/failed": 2.0,
}
QUIET = {"alarm/logprob_error": 0.0, "alarm/kept": 0.0, "alarm/failed": 0.0}


@pytest.mark.parametrize(
    ("changes", "name", "said"),
    [
        (
            {"policy/logprob_error_current": 0.0011},
            "logprob_error",
            r"differ by 0\.0011 .* 0\.001;",
        ),
        ({"policy/logprob_error_current": math.nan}, "logprob_error", "differ by nan .* arrive"),
        ({"policy/kept": 0.49}, "kept", "keep 49% .* less than alarms.min_kept 50%; .* stale"),
        (
            {"rollouts/failed": 2.1},
            "failed",
            "21% of the rollouts .*max_failed 20%; .* judge",
        ),
    ],
)
def test_an_alarm_names_value_threshold_and_cause_once(changes, name, said):
    heard = []
    alarms = Alarms(AlarmConfig(), heard.append)
    assert alarms.check(SOUND, update=1) == QUIET
    assert heard == []
    for update in (2, 3):
        assert alarms.check(SOUND | changes, update=update) == QUIET | {f"alarm/{name}": 1.0}
    (message,) = heard
    assert message.startswith("Warning at update 2: ")
    assert re.search(said, message), message
    assert alarms.check(SOUND, update=4) == QUIET


def test_thresholds_may_be_changed_and_are_checked():
    heard = []
    alarms = Alarms(AlarmConfig(max_logprob_error=1e-6, min_kept=0.0, max_failed=0.1), heard.append)
    assert sum(alarms.check(SOUND, update=1).values()) == 2
    for name, value in (("max_logprob_error", 0.0), ("min_kept", 1.1), ("max_failed", -0.1)):
        with pytest.raises(ConfigError, match=f"alarms.{name} is {value}"):
            AlarmConfig(**{name: value})
