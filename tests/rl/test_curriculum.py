"""The curriculum: wanted pass rates from easy to hard, in fixed proportions."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nemotron3.errors import ConfigError, DataError
from nemotron3.rl.curriculum import Curriculum, CurriculumConfig
from tests.rl.playground import OtherParity, Parity

QUOTAS = {"parity": 3, "odd": 2}


def curriculum(config=None, *, size=40, steps=11, seed=0):
    pools = {
        environment.name: environment.distinct_tasks(size, split="train")
        for environment in (Parity(), OtherParity())
    }
    made = Curriculum(config or CurriculumConfig(), QUOTAS, pools, steps=steps, seed=seed)
    rates = {name: [i / size for i in range(size)] for name in pools}
    made.use(rates)
    rate_of = {
        (name, row["number"]): rate
        for name, rows in pools.items()
        for row, rate in zip(rows, rates[name], strict=True)
    }
    return made, lambda row: rate_of[row["agent_ref"]["name"], row["number"]]


def mean_rate(made, rate, step):
    rows = [r for round_ in range(20) for r in made.tasks(step, round_=round_, missing=QUOTAS)]
    return sum(map(rate, rows)) / len(rows)


def test_tasks_grow_harder_in_proportions_that_stay():
    made, rate = curriculum(CurriculumConfig(start=0.8, end=0.2, deviation=0.05))
    means = [mean_rate(made, rate, step) for step in (0, 5, 10)]
    assert means == pytest.approx([0.8, 0.5, 0.2], abs=0.05)
    names = [row["agent_ref"]["name"] for row in made.tasks(3, missing=QUOTAS)]
    assert {name: names.count(name) for name in QUOTAS} == QUOTAS


@given(step=st.integers(0, 10), round_=st.integers(0, 3), seed=st.integers(0, 5))
def test_an_updates_tasks_follow_from_step_and_seed_and_none_is_twice_in_it(step, round_, seed):
    first, again = (curriculum(seed=seed)[0] for _ in range(2))
    again.tasks(9 - step if step < 9 else 0, missing=QUOTAS)  # what was asked before is no matter
    rows = first.tasks(step, round_=round_, missing=QUOTAS)
    assert rows == again.tasks(step, round_=round_, missing=QUOTAS)
    assert len({(row["agent_ref"]["name"], row["number"]) for row in rows}) == len(rows)


def test_tasks_that_are_always_solved_are_dropped():
    pools = {"parity": Parity().distinct_tasks(4, split="train")}
    made = Curriculum(CurriculumConfig(start=1.0), {"parity": 9}, pools, steps=1, seed=0)
    made.use({"parity": [1.0, 0.5, 1.0, 0.0]})
    numbers = {row["number"] for row in made.tasks(0, missing={"parity": 9})}
    assert numbers == {pools["parity"][i]["number"] for i in (1, 3)}
    with pytest.raises(DataError, match="solves all 4 tasks of parity always"):
        made.use({"parity": [1.0] * 4})


def test_pass_rates_are_measured_again_at_equal_distances():
    assert [CurriculumConfig().profile_step(step) for step in (0, 7, 50)] == [0, 0, 0]
    again = CurriculumConfig(profile_every_steps=20)
    assert [again.profile_step(step) for step in (0, 19, 20, 59)] == [0, 0, 20, 40]


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"pool": 0}, "pool is 0"),
        ({"samples": 0}, "samples is 0"),
        ({"start": 1.2}, "start is 1.2; a pass rate is from 0 to 1"),
        ({"deviation": 0.0}, "deviation is 0.0"),
        ({"profile_every_steps": 0}, "profile_every_steps is 0"),
    ],
)
def test_settings_are_checked(fields, said):
    with pytest.raises(ConfigError, match=said):
        CurriculumConfig(**fields)
