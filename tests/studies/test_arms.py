"""The arms: equal numbers of updates and rollouts, of every environment."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nemotron3.errors import ConfigError
from nemotron3.models.lora import LoRAConfig
from nemotron3.recipes.rl import tiny_rl
from nemotron3.rl.sampling_plan import EnvironmentConfig
from nemotron3.studies.simultaneous_rl.arms import Arm, Cell, parts_of, run_of
from nemotron3.studies.simultaneous_rl.config import SimultaneousRL, full_study, quick_study


def study_of(num_environments, share, replay):
    base = tiny_rl()
    environments = tuple(EnvironmentConfig(name=f"e{i}") for i in range(num_environments))
    batch = num_environments * share * base.group_size
    training = replace(base.training, batch_size=batch, microbatch_size=base.group_size)
    run = replace(base, environments=environments, training=training)
    return SimultaneousRL(run=run, steps=num_environments, replay=replay)


@given(
    num_environments=st.integers(2, 9),
    share=st.integers(1, 6),
    stage=st.integers(1, 20),
    replay=st.floats(0.01, 0.99),
    arm=st.sampled_from(list(Arm)),
)
def test_every_arm_has_the_same_updates_and_rollouts_of_every_environment(
    num_environments, share, stage, replay, arm
):
    study = study_of(num_environments, share, replay)
    steps = stage * num_environments
    parts = parts_of(study, arm, steps)
    assert sum(part.steps for part in parts) == steps
    totals = {}
    for index, part in enumerate(parts):
        assert sum(part.prompts.values()) == study.prompts
        for name, count in part.prompts.items():
            totals[name] = totals.get(name, 0) + count * part.steps
        cell = Cell(arm=arm, learning_rate=1e-3, seed=2)
        # What a run makes of the weights is checked by `run_of` itself.
        run = run_of(study, part, index, cell=cell, model="model", stage=stage)
        assert run.training.schedule.total_steps == run.training.steps == part.steps
        assert run.max_rounds == 1
    assert totals == {f"e{i}": share * steps for i in range(num_environments)}


def test_orders_are_opposite_and_replay_has_all_others():
    study = study_of(3, 8, 0.25)
    orders = [
        [next(iter(part.prompts)) for part in parts_of(study, arm, 6)]
        for arm in (Arm.STAGED, Arm.STAGED_REVERSED)
    ]
    assert orders == [["e0", "e1", "e2"], ["e2", "e1", "e0"]]
    assert [part.prompts for part in parts_of(study, Arm.REPLAY, 6)] == [
        {"e0": 18, "e1": 3, "e2": 3},
        {"e0": 3, "e1": 18, "e2": 3},
        {"e0": 3, "e1": 3, "e2": 18},
    ]


def test_no_two_trainings_share_their_tasks():
    study = study_of(4, 2, 0.2)
    seeds = [
        run_of(
            study,
            part,
            index,
            cell=Cell(arm=Arm.STAGED, learning_rate=1e-3, seed=seed),
            model="model",
            stage=2,
        ).seed
        for seed in range(3)
        for index, part in enumerate(parts_of(study, Arm.STAGED, 8))
    ]
    assert len({*seeds}) == 12


def test_named_studies_are_sound():
    full, quick = full_study("model"), quick_study("model")
    assert (full.num_stages, full.num_seeds, len(full.learning_rates)) == (9, 4, 3)
    assert (full.steps, full.prompts, quick.prompts) == (90, 36, 16)
    assert (quick.num_stages, quick.num_seeds, quick.steps) == (4, 3, None)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"steps": 7}, "steps is 7; .* multiple of 3, such as 6"),
        ({"steps": 0}, "steps is 0"),
        ({"steps": None}, "steps and budget_s exclude each other"),
        ({"budget_s": 5.0}, "steps and budget_s exclude each other"),
        ({"learning_rates": ()}, "name one or more"),
        ({"learning_rates": (1e-3, 1e-3)}, "each once"),
        ({"learning_rates": (0.0,)}, "above 0"),
        ({"learning_rates": (float("nan"),)}, "above 0"),
        ({"num_seeds": 0}, "num_seeds is 0"),
        ({"replay": 1.0}, "replay is 1.0"),
        ({"held_out_tasks": 0}, "held_out_tasks is 0"),
        ({"smallest_effect": 0.0}, "smallest_effect is 0.0"),
    ],
)
def test_settings_that_cannot_be_are_refused(changes, said):
    with pytest.raises(ConfigError, match=said):
        replace(study_of(3, 2, 0.2), **changes)


def test_one_environment_or_uneven_shares_are_refused():
    study = study_of(3, 2, 0.2)
    with pytest.raises(ConfigError, match="compares orders, so it needs 2"):
        replace(study, run=replace(study.run, environments=study.run.environments[:1]))
    whole = replace(study.run.training, bias_update_rate=0.0, parameter_groups=())
    with pytest.raises(ConfigError, match=r"run.lora is set; the study trains whole models"):
        replace(study, run=replace(study.run, training=whole, lora=LoRAConfig()))
    training = replace(study.run.training, batch_size=64, microbatch_size=64)
    with pytest.raises(ConfigError, match=r"training.batch_size is 64; its 8 prompts"):
        replace(study, run=replace(study.run, training=training))


def test_a_sweep_leaves_rates_of_their_own_as_the_recipe_has_them():
    study = full_study("model")
    part = parts_of(study, Arm.SIMULTANEOUS, study.steps)[0]
    base = {group.name: group for group in study.run.training.parameter_groups}
    norm = base["final norm"].lr_scale * study.run.training.optimizer.lr
    for rate in study.learning_rates:
        cell = Cell(arm=Arm.SIMULTANEOUS, learning_rate=rate, seed=0)
        training = run_of(study, part, 0, cell=cell, model="model", stage=10).training
        groups = {group.name: group for group in training.parameter_groups}
        assert training.optimizer.lr == rate
        assert groups["final norm"].lr_scale * rate == pytest.approx(norm)
        assert groups["routers"] == base["routers"]
