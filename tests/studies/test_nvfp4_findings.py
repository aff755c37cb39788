"""Ingredients, arms, verdicts, the budget and the pages, against values computed by hand."""

import math
from dataclasses import replace

import pytest
from benchmarks.drawing import BLUE
from benchmarks.studies import STUDIES, draw_nvfp4, read_result

from nemotron3.config import write_json
from nemotron3.data import LoadTokenizerConfig
from nemotron3.errors import ConfigError
from nemotron3.models.nvfp4_recipe import NVFP4Config
from nemotron3.models.precision import PrecisionConfig
from nemotron3.recipes.pretrain import small, tiny
from nemotron3.studies.nvfp4 import NVFP4Study
from nemotron3.studies.nvfp4.arms import CHANGES, DESCRIPTIONS, Arm, Cell, run_of
from nemotron3.studies.nvfp4.cell import CellResult, Point
from nemotron3.studies.nvfp4.config import full_study, quick_study
from nemotron3.studies.nvfp4.findings import closed_share, findings_of
from nemotron3.studies.nvfp4.ingredients import matrices, measure_roundings
from nemotron3.studies.nvfp4.page import as_markdown, curves, verdicts, write_page
from nemotron3.studies.nvfp4.plan import Timing, cell_s, make_plan, statement
from nemotron3.studies.nvfp4.result import StudyResult
from nemotron3.training.schedules import Constant

STUDY = NVFP4Study(run=tiny(), steps=120, num_seeds=3)


@pytest.fixture(scope="module")
def roundings():
    return {(r.ingredient, r.matrix): r for r in measure_roundings()}


@pytest.mark.parametrize("matrix", list(matrices()))
def test_ingredients_have_the_errors_and_biases_that_they_are_for(roundings, matrix):
    def of(ingredient):
        return roundings[ingredient, matrix]

    nearest, stochastic = of("blocks of 16, nearest"), of("blocks of 16, stochastic")
    assert 0.007 < nearest.error < 0.01
    assert of("16 x 16, nearest").error > 1.3 * nearest.error
    assert of("16 x 16, nearest").flushed > 1.4 * nearest.flushed
    assert of("blocks of 16, four-over-six").error < 0.95 * nearest.error
    assert 2 * nearest.error < stochastic.error < 3 * nearest.error
    assert of("MS-EDEN").error < 0.5 * stochastic.error
    assert of("MXFP8").error < 0.1 * nearest.error
    for ingredient in ("16 x 16, nearest", "blocks of 16, nearest", "MXFP8"):
        assert of(ingredient).bias == pytest.approx(of(ingredient).error)
    for ingredient in ("blocks of 16, stochastic", "blocks of 16, Hadamard, stochastic", "MS-EDEN"):
        assert abs(of(ingredient).bias) < 0.02 * of(ingredient).error


def test_the_hadamard_transform_keeps_small_values_beside_large_ones(roundings):
    for rounding in ("nearest", "stochastic"):
        plain = roundings[f"blocks of 16, {rounding}", "heavy-tailed"]
        turned = roundings[f"blocks of 16, Hadamard, {rounding}", "heavy-tailed"]
        assert turned.flushed < 0.6 * plain.flushed


def nvfp4_of(arm, seed=0):
    precision = run_of(STUDY, Cell(arm=arm, seed=seed), steps=120).training.precision
    assert precision.recipe == ("plain" if arm is Arm.BASELINE else "nvfp4")
    return precision.nvfp4


def test_every_arm_is_the_recipe_with_one_change():
    late = 120 - 42  # the learning rate decays over 35%
    assert nvfp4_of(Arm.RECIPE) == nvfp4_of(Arm.BASELINE) == NVFP4Config()
    assert {arm: nvfp4_of(arm) for arm in [*Arm][2:]} == {
        Arm.NO_TILES: NVFP4Config(weights="1d"),
        Arm.NO_HADAMARD: NVFP4Config(transform="none"),
        Arm.NO_STOCHASTIC: NVFP4Config(gradients="nearest"),
        Arm.NO_TAIL: NVFP4Config(high_precision_tail=0.0),
        Arm.FOUR_OVER_SIX: NVFP4Config(weights="1d", scales="four_over_six"),
        Arm.MS_EDEN: NVFP4Config(gradients="ms_eden"),
        Arm.FORWARD_ONLY: NVFP4Config(products=("fprop",)),
        Arm.BACKWARD_ONLY: NVFP4Config(products=("dgrad", "wgrad")),
        Arm.LATE_SWITCH: NVFP4Config(fprop_steps=late),
        Arm.COMBINED: NVFP4Config(
            weights="1d", scales="four_over_six", gradients="ms_eden", fprop_steps=late
        ),
    }
    assert set(DESCRIPTIONS) == set(Arm)


@pytest.mark.parametrize("steps", [8, 11, 120])
def test_arms_of_a_seed_differ_in_precision_alone(steps):
    for seed in (0, 3):
        runs = [run_of(STUDY, Cell(arm=arm, seed=seed), steps=steps) for arm in Arm]
        plain = [
            replace(run, training=replace(run.training, precision=PrecisionConfig()))
            for run in runs
        ]
        assert all(run == plain[0] for run in plain)
        assert runs[0].seed == seed
        assert runs[1].training.precision.nvfp4.seed == seed
        schedule = runs[0].training.schedule
        assert schedule.total_steps == runs[0].training.steps == steps


def test_named_studies_are_sound():
    full, quick = full_study(tiny()), quick_study(tiny())
    assert (full.name, full.num_seeds, full.steps) == ("nvfp4", 8, 600)
    other = full_study(small())
    assert (other.name, other.steps) == ("nvfp4-small", 2000)
    late = run_of(other, Cell(arm=Arm.LATE_SWITCH, seed=0), steps=other.steps).training.precision
    assert (late.activations, late.nvfp4.fprop_steps) == ("bfloat16", 2000 - 400)
    assert (quick.num_seeds, quick.steps, quick.budget_s) == (3, None, 840)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"steps": 7}, "steps is 7; warm-up, plateau and decay take 8"),
        ({"steps": None}, "steps and budget_s exclude each other"),
        ({"budget_s": 5.0}, "steps and budget_s exclude each other"),
        ({"num_seeds": 0}, "num_seeds is 0"),
        ({"smallest_effect": 0.0}, "smallest_effect is 0.0"),
    ],
)
def test_settings_that_cannot_be_are_refused(changes, said):
    with pytest.raises(ConfigError, match=said):
        replace(STUDY, **changes)


FLUSHED = {
    f"{product}_layer_{layer:02d}": share
    for product in ("fprop", "dgrad", "wgrad")
    for layer, share in ((0, 0.1), (3, 0.3))
}


def cell(arm, seed, loss, *, unrounded=None, failure=None):
    return CellResult(
        cell=Cell(arm=arm, seed=seed),
        failure=failure,
        bits_per_byte=(Point(step=60, value=2 * loss), Point(step=120, value=loss)),
        unrounded=None if failure else unrounded or loss,
        flushed={} if arm is Arm.BASELINE else FLUSHED,
        zero_gradients=() if arm is Arm.BASELINE else (Point(step=60, value=0.01),),
        seconds=5.0,
    )


def sweep(gaps, *, seeds=4):
    """Cells whose relative difference to the baseline is given by arm, 0.001 wider by seed."""
    cells = []
    for seed in range(seeds):
        base = 2.0 + 0.1 * seed
        for arm in Arm:
            gap = 0.0 if arm is Arm.BASELINE else gaps.get(arm, 0.01) + 0.0001 * (seed % 3)
            cells.append(cell(arm, seed, base * (1 + gap)))
    return cells


def finding(cells, arm, against=Arm.BASELINE, measure="training"):
    found = findings_of(STUDY, cells)
    return next(f for f in found if (f.arm, f.against, f.measure) == (arm, against, measure))


GAPS = {Arm.NO_TAIL: 0.03, Arm.LATE_SWITCH: 0.004, Arm.BACKWARD_ONLY: -0.002}


def test_differences_are_relative_to_the_baseline_and_signed():
    cells = sweep(GAPS)
    recipe = finding(cells, Arm.RECIPE)
    assert recipe.difference == pytest.approx(0.01 + 0.0001 * (0 + 1 + 2 + 0) / 4)
    assert recipe.deviation == pytest.approx(0.0001 * math.sqrt(11 / 12))
    assert recipe.low < recipe.difference < recipe.high
    assert recipe.family_low < recipe.low  # eleven comparisons at once
    assert recipe.family_high > recipe.high
    assert (recipe.claim, recipe.verdict, recipe.num_seeds) == ("higher", "holds", 4)
    less = finding(cells, Arm.BACKWARD_ONLY)
    assert less.difference < 0
    assert less.verdict == "does not hold"


def test_arms_are_judged_by_what_is_claimed_of_them():
    cells = [
        *(done for done in sweep(GAPS) if done.cell.arm not in (Arm.NO_TAIL, Arm.LATE_SWITCH)),
        *(cell(Arm.NO_TAIL, seed, (2 + 0.1 * seed) * (1.03 + 0.001 * seed)) for seed in range(4)),
        *(cell(Arm.LATE_SWITCH, seed, (2 + 0.1 * seed) * 1.004) for seed in range(4)),
    ]
    tail = finding(cells, Arm.NO_TAIL, Arm.RECIPE)
    assert (tail.claim, tail.verdict) == ("higher", "holds")
    assert tail.difference == pytest.approx(0.03 + 0.0015 - 0.010075)
    late = finding(cells, Arm.LATE_SWITCH, Arm.RECIPE)
    assert (late.claim, late.verdict) == ("lower", "holds")
    assert late.low < late.difference < late.high < 0
    assert late.family_low < late.low < late.high < late.family_high


def test_noise_single_seeds_and_failed_cells_cannot_be_told():
    single = finding(sweep(GAPS, seeds=1), Arm.RECIPE)
    assert (single.verdict, single.deviation, single.detectable) == ("cannot be told", None, None)
    assert math.isinf(single.low)
    assert math.isinf(single.family_high)
    without_spread = finding(sweep(GAPS), Arm.LATE_SWITCH, Arm.RECIPE)  # alike in every seed
    assert (without_spread.verdict, without_spread.detectable) == ("cannot be told", None)
    cells = sweep(GAPS)
    noisy = [
        cell(Arm.MS_EDEN, seed, 2.0 + 0.1 * seed + (-0.2, 0.3, -0.1, 0.1)[seed])
        if done.cell.arm is Arm.MS_EDEN
        else done
        for done in cells
        for seed in [done.cell.seed]
    ]
    assert finding(noisy, Arm.MS_EDEN).verdict == "cannot be told"
    failed = [
        cell(Arm.RECIPE, 1, 9.0, failure="DivergenceError: nan")
        if (done.cell.arm, done.cell.seed) == (Arm.RECIPE, 1)
        else done
        for done in cells
    ]
    assert finding(failed, Arm.RECIPE).num_seeds == 3


def test_the_finished_model_is_a_measure_of_its_own():
    cells = [replace(done, unrounded=2.0 + 0.01 * done.cell.seed) for done in sweep(GAPS)]
    assert finding(cells, Arm.RECIPE, measure="unrounded").difference == 0
    assert finding(cells, Arm.RECIPE).difference > 0


def test_the_share_of_a_gap_is_told_where_there_is_one():
    found = findings_of(STUDY, sweep(GAPS))
    late = closed_share(found, "training", Arm.LATE_SWITCH)
    assert late == pytest.approx(1 - 0.004075 / 0.010075)
    none = findings_of(STUDY, sweep({Arm.RECIPE: -0.001}))
    assert closed_share(none, "training", Arm.LATE_SWITCH) is None


TIMING = Timing(
    update_s={arm.value: 2.0 if arm is Arm.MS_EDEN else 0.5 for arm in Arm},
    evaluation_s={arm.value: 1.0 for arm in Arm},
    run_s=3.0,
)


def test_costs_are_counted_by_hand_and_said_beforehand():
    assert cell_s(TIMING, Arm.RECIPE, 100) == 100 * 0.5 + 6 * 1.0 + 3.0
    plan = make_plan(STUDY, TIMING, jobs=2)
    assert plan.expected_s == pytest.approx(3 * (11 * 69 + 249) / 2)
    said = " ".join(statement(STUDY, TIMING, plan))
    assert "36 cells: 12 arms x 3 seeds, each 120 updates of 8 x 256 tokens" in said
    assert "0.50 s (baseline), 0.50 s (recipe), 2.00 s (ms-eden)" in said
    assert f"{plan.smallest_effect:.1f} standard deviations" in said
    alone = make_plan(replace(STUDY, num_seeds=1), TIMING, jobs=2)
    assert "no difference can be told" in " ".join(statement(STUDY, TIMING, alone))


@pytest.mark.parametrize("speed", [0.01, 0.5, 2.0, 50.0])
def test_a_budget_decides_updates_and_seeds(speed):
    study = quick_study(tiny())
    timing = replace(TIMING, update_s={arm: speed * s for arm, s in TIMING.update_s.items()})
    plan = make_plan(study, timing, jobs=2)
    if plan.expected_s > study.budget_s:
        assert (plan.num_seeds, plan.steps) == (1, 8)
        assert "too slow for 14 min" in statement(study, timing, plan)[-1]
    else:
        longer = replace(study, steps=plan.steps + 1, budget_s=None, num_seeds=plan.num_seeds)
        assert make_plan(longer, timing, jobs=2).expected_s > study.budget_s


def published(cells):
    return StudyResult(
        command="nemotron3 study nvfp4",
        date="2026-11-30",
        commit="0123456789",
        device="a <CPU>",
        study=STUDY,
        timing=TIMING,
        plan=make_plan(STUDY, TIMING, jobs=2),
        roundings=tuple(measure_roundings(2)),
        cells=tuple(cells),
        findings=tuple(findings_of(STUDY, cells)),
    )


def test_pages_show_everything_and_escape_it(tmp_path):
    cells = sweep(GAPS)
    cells[-1] = cell(Arm.COMBINED, 3, 2.0, failure="DivergenceError: <script>a|b</script>")
    result = published(cells)
    page = write_page(tmp_path / "report.html", result).read_text()
    assert "<script" not in page
    assert page.count("<svg") == 6
    text = as_markdown(result)
    assert "<script" not in text
    for table in text.split("### ")[1:]:
        rows = [line for line in table.splitlines() if line.startswith("|")]
        assert len({row.replace("\\|", "").count("|") for row in rows}) == 1
    for arm in Arm:
        assert arm.value in text
        assert arm.value in page
    shares = {arm: f"{closed_share(result.findings, 'training', arm):.0%}" for arm in CHANGES}
    assert shares[Arm.LATE_SWITCH] == "60%"
    assert f"| {shares[Arm.LATE_SWITCH]} |" in text
    assert "| 0 | 10.0% |" in text.split("### Values that became zero, layer by layer")[1]
    assert any(line.startswith("recipe against baseline: +1.01%") for line in verdicts(result))
    drawn = {one.label: one for one in curves(result, [*Arm][1:])}
    assert drawn["recipe"].values.tolist() == pytest.approx([0.010075, 0.010075])


def test_a_result_is_read_again_drawn_and_filled_in(tmp_path):
    result = published(sweep(GAPS, seeds=2))
    write_json(tmp_path / "result.json", result)
    docs = STUDIES["pretrain"]
    assert read_result(tmp_path / "result.json") == (docs, result)
    draw_nvfp4(result, tmp_path / "drawing.svg")
    assert BLUE in (tmp_path / "drawing.svg").read_text()
    text = "# T\n\n<!-- result -->\nNot measured yet.\n<!-- /result -->\nend\n"
    assert "### Error and bias" in docs.filled(text, result)
    assert docs.filled(docs.filled(text, result), None) == text


def test_runs_that_the_arms_cannot_have_are_refused():
    corpus = replace(tiny().corpus, tokenizer=LoadTokenizerConfig(path="m"))
    with pytest.raises(ConfigError, match=r"run.init_from is m; seeds differ"):
        NVFP4Study(run=replace(tiny(), init_from="m", corpus=corpus), steps=120)
    training = replace(tiny().training, schedule=Constant(warmup_steps=3))
    with pytest.raises(ConfigError, match="schedule is 'constant'; the late switch"):
        NVFP4Study(run=replace(tiny(), training=training), steps=120)
    precision = PrecisionConfig(recipe="nvfp4")
    training = replace(tiny().training, precision=precision)
    with pytest.raises(ConfigError, match="recipe is 'nvfp4'; the arms of the study set it"):
        NVFP4Study(run=replace(tiny(), training=training), steps=120)
