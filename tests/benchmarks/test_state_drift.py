"""The study of narrow states, at a size that takes seconds."""

from benchmarks import state_drift
from tests.tiny import tiny_model


def test_position_in_the_third_word_is_mixed_sooner():
    rows = {row["rounds"]: row for row in state_drift.bits()}
    assert abs(rows[5]["third word"]) < 0.02 < rows[5]["second"]
    assert rows[3]["third word"] > 0.1
    assert abs(rows[10]["second"]) < 0.01


def test_a_long_memory_needs_random_rounding():
    """What int8 to the nearest loses within some hundred steps, float16 loses within thousands."""
    rows = {row["state"]: row for row in state_drift.scan(2048)}
    last = {name: dict(zip(row["decays"], row["errors"][-1], strict=True))
            for name, row in rows.items()}  # fmt: skip
    assert last["int8, to the nearest"][0.999] > 2 * last["int8, stochastic"][0.999]
    assert (
        last["float16, stochastic, 3 rounds"][0.9999]
        > 4 * (last["float16, stochastic, 5 rounds"][0.9999])
    )
    assert last["float16, stochastic, 5 rounds"][0.999] < 0.01


def test_a_model_is_read_in_every_precision(tmp_path):
    tiny_model("MEM*E").save_pretrained(tmp_path)
    rows = {row["state"]: row for row in state_drift.model_drift(tmp_path, 16, 2)}
    assert list(rows) == [*state_drift.STATES, *state_drift.KEYS]
    fine, coarse = rows["float16, stochastic, 5 rounds"], rows["int8, stochastic"]
    assert 0 < fine["kl"] < coarse["kl"] < 0.1
    assert fine["state_error_by_part"][-1] < coarse["state_error_by_part"][-1]
    assert fine["same_top_1"] > 0.8
