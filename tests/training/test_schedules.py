import itertools
import math
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nemotron3.config import from_record, to_record
from nemotron3.errors import ConfigError
from nemotron3.training.schedules import WSD, Constant, Cosine, Schedule

DECAYS = ["minus_sqrt", "linear", "cosine", "exponential"]


def megatron_rates(steps: int, *, peak: float, minimum: float, **options) -> list[float]:
    """The rates of megatron-core's own scheduler, stepped from the start."""
    megatron = pytest.importorskip("megatron.core.optimizer_param_scheduler")
    group = {"lr": 0.0, "weight_decay": 0.0}
    scheduler = megatron.OptimizerParamScheduler(
        SimpleNamespace(param_groups=[group]),
        init_lr=0.0,
        max_lr=peak,
        min_lr=minimum,
        start_wd=0.1,
        end_wd=0.1,
        wd_incr_steps=steps,
        wd_incr_style="constant",
        **options,
    )
    rates = []
    for _ in range(steps):
        rates.append(group["lr"])
        scheduler.step(1)
    return rates


def rates(schedule: Schedule, steps: int, peak: float) -> list[float]:
    return [schedule.learning_rate(step, peak=peak) for step in range(steps)]


@pytest.mark.filterwarnings("ignore")  # megatron-core's imports, not ours
@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize(("warmup", "length", "total"), [(10, 40, 100), (0, 1, 50), (30, 70, 100)])
def test_wsd_is_megatrons(decay, warmup, length, total):
    schedule = WSD(warmup_steps=warmup, decay_steps=length, total_steps=total, decay=decay)
    wanted = megatron_rates(
        total + 20,
        peak=4.5e-4,
        minimum=4.5e-4 * 0.01,
        lr_warmup_steps=warmup,
        lr_decay_steps=total,
        lr_decay_style="WSD",
        wsd_decay_steps=length,
        lr_wsd_decay_style=decay,
    )
    assert rates(schedule, total + 20, 4.5e-4) == pytest.approx(wanted, rel=1e-12, abs=0)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("warmup", "total"), [(10, 100), (0, 60), (59, 60)])
def test_cosine_is_megatrons(warmup, total):
    wanted = megatron_rates(
        total + 20,
        peak=1e-3,
        minimum=1e-4,
        lr_warmup_steps=warmup,
        lr_decay_steps=total,
        lr_decay_style="cosine",
    )
    schedule = Cosine(warmup_steps=warmup, total_steps=total, final_fraction=0.1)
    assert rates(schedule, total + 20, 1e-3) == pytest.approx(wanted, rel=1e-12, abs=0)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("warmup", [0, 7])
def test_constant_is_megatrons(warmup):
    wanted = megatron_rates(
        50,
        peak=1e-3,
        minimum=0.0,
        lr_warmup_steps=warmup,
        lr_decay_steps=40,
        lr_decay_style="constant",
    )
    found = rates(Constant(warmup_steps=warmup), 50, 1e-3)
    assert found == pytest.approx(wanted, rel=1e-12, abs=0)


def test_wsd_by_hand():
    schedule = WSD(warmup_steps=100, decay_steps=400, total_steps=1000, final_fraction=0.0)
    wanted = {0: 0.0, 50: 0.5, 100: 1.0, 600: 1.0, 700: 0.5, 1000: 0.0, 5000: 0.0}
    assert {step: schedule.learning_rate(step, peak=1.0) for step in wanted} == wanted
    assert schedule.learning_rate(800, peak=1.0) == pytest.approx(1 - math.sqrt(0.5))


@settings(deadline=None)
@given(
    st.sampled_from(DECAYS),
    st.integers(0, 50),
    st.integers(1, 50),
    st.integers(0, 50),
    st.floats(0, 1),
)
def test_the_rate_rises_holds_and_falls_within_its_bounds(decay, warmup, length, stable, final):
    total = warmup + stable + length
    schedule = WSD(
        warmup_steps=warmup,
        decay_steps=length,
        total_steps=total,
        decay=decay,
        final_fraction=final,
    )
    found = rates(schedule, total + 3, 1.0)
    rising, falling = found[: warmup + 1], found[warmup:]
    assert rising == sorted(rising)
    assert all(b <= a + 1e-15 for a, b in itertools.pairwise(falling))
    assert max(found) == found[warmup] == 1.0
    assert found[-1] == final
    assert found[total] == pytest.approx(final, abs=1e-15)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: WSD(warmup_steps=60, decay_steps=50, total_steps=100), "do not fit into"),
        (lambda: WSD(warmup_steps=0, decay_steps=0, total_steps=100), "decay_steps is 0"),
        (lambda: WSD(warmup_steps=-1, decay_steps=1, total_steps=9), "warmup_steps is -1"),
        (lambda: Cosine(warmup_steps=9, total_steps=9), "leave nothing"),
        (lambda: Cosine(warmup_steps=0, total_steps=9, final_fraction=1.5), "final_fraction"),
        (lambda: Constant(warmup_steps=-3), "warmup_steps is -3"),
    ],
)
def test_impossible_schedules_are_refused(build, message):
    with pytest.raises(ConfigError, match=message):
        build()


@pytest.mark.parametrize(
    "schedule",
    [
        WSD(warmup_steps=1, decay_steps=2, total_steps=9),
        Cosine(warmup_steps=1, total_steps=9),
        Constant(),
    ],
)
def test_schedules_are_recorded_by_kind(schedule):
    assert from_record(Schedule, to_record(schedule)) == schedule
