import pytest

from nemotron3.config.units import Steps, Tokens, parse_duration
from nemotron3.errors import ConfigError


@pytest.mark.parametrize(
    ("text", "duration"),
    [
        ("200", Steps(200)),
        ("1 step", Steps(1)),
        ("10k steps", Steps(10_000)),
        ("1.5M tokens", Tokens(1_500_000)),
        ("8.4B tokens", Tokens(8_400_000_000)),
        ("25T tokens", Tokens(25 * 10**12)),
        (" 1_000,000 tokens ", Tokens(1_000_000)),
    ],
)
def test_durations_are_read_with_their_unit(text, duration):
    assert parse_duration(text) == duration
    assert parse_duration(str(duration)) == duration


@pytest.mark.parametrize(
    "text", ["", "soon", "-5 steps", "1.5 steps", "1.00001k steps", "5 samples"]
)
def test_unreadable_durations_say_what_was_found(text):
    with pytest.raises(ConfigError, match="duration"):
        parse_duration(text)


def test_a_class_reads_its_own_unit_only():
    assert Tokens.parse("1.5M") == Tokens(1_500_000)
    with pytest.raises(ConfigError, match="counts tokens"):
        Tokens.parse("200 steps")


def test_steps_and_tokens_of_the_same_count_differ():
    assert Steps(5) != Tokens(5)
    assert Steps(5) < Steps(6)


def test_tokens_round_up_to_whole_steps():
    assert Tokens(8193).in_steps(tokens_per_step=8192) == 2
    assert Tokens(8192).in_steps(tokens_per_step=8192) == 1
    assert Steps(7).in_steps(tokens_per_step=8192) == 7


def test_negative_durations_are_refused():
    with pytest.raises(ConfigError, match="-1 steps is negative"):
        Steps(-1)


def test_counts_of_any_size_are_exact():
    count = 10**28 + 1
    assert Tokens.parse(str(Tokens(count))) == Tokens(count)
