"""The loop: the order of its actions, and that stopping and resuming changes nothing."""

import dataclasses
import json

import pytest
import torch

from nemotron3.checkpoint.retention import RetentionConfig
from nemotron3.checkpoint.store import CheckpointStore
from nemotron3.errors import CheckpointError, ConfigError, DivergenceError
from nemotron3.models.lora import LoRAConfig, add_lora
from nemotron3.models.nemotron_h import LanguageModel
from nemotron3.models.precision import PrecisionConfig
from nemotron3.observe.metrics import MetricLog, read_metrics
from nemotron3.observe.sinks import JsonlSink
from nemotron3.training.objective import LossTerms
from nemotron3.training.optimizers import AdamWConfig, SGDConfig
from nemotron3.training.parameter_groups import ParameterGroupConfig
from nemotron3.training.schedules import WSD
from nemotron3.training.trained_parameters import trained_by_part
from nemotron3.training.trainer import Trainer, TrainingConfig, model_weights
from tests.tiny import tiny_config
from tests.training.batches import documents, pack, pretraining

MODEL = tiny_config("ME*-E/*E/*E", hidden_size=32)
CONFIG = TrainingConfig(
    steps=7,
    batch_size=2,
    microbatch_size=1,
    seq_len=12,
    optimizer=AdamWConfig(lr=1e-2),
    schedule=WSD(total_steps=7, warmup_steps=1, decay_steps=3),
    evaluate_every_steps=3,
    checkpoint_every_steps=2,
    measure_every_steps=4,
)


def batches(step):
    return [pack([part]) for part in documents(12, 12, seed=step)]


def trainer_in(folder, config=CONFIG, model_config=MODEL, **parts):
    model = LanguageModel.from_config(model_config, seed=3)
    return Trainer(
        model,
        config,
        **{
            "objective": pretraining(model),
            "batches": batches,
            "evaluation": lambda model: {"eval/weight": model.output_weight.sum().item()},
            "store": CheckpointStore(folder, retention=RetentionConfig(keep_last=3)),
            "peak_flops": 1e9,
        }
        | parts,
    )


class StoppedError(Exception):
    """An interruption by a test."""


def fit(trainer, folder, *, stop_after=None):
    next_step = trainer.resume() + 1

    def on_step(report):
        if report.step == stop_after:
            raise StoppedError

    with MetricLog([JsonlSink(folder / "metrics.jsonl", next_step=next_step)]) as log:
        trainer.fit(log, on_step=on_step)
    return trainer


def logged(folder):
    return [
        (step, {name: v for name, v in metrics.items() if not name.startswith("perf/")})
        for step, metrics in read_metrics(folder / "metrics.jsonl")
    ]


def test_evaluation_checkpoints_and_measurements_come_when_they_should(tmp_path):
    fit(trainer_in(tmp_path), tmp_path)
    lines = dict(logged(tmp_path))
    assert list(lines) == [1, 2, 3, 4, 5, 6, 7]
    assert [step for step, line in lines.items() if "eval/weight" in line] == [3, 6, 7]
    assert [s for s, line in lines.items() if "model/residual_norm_layer_00" in line] == [4]
    assert CheckpointStore(tmp_path).steps() == [4, 6, 7]


def test_rates_follow_the_schedule_and_speed_is_told(tmp_path):
    fit(trainer_in(tmp_path), tmp_path)
    for step, metrics in read_metrics(tmp_path / "metrics.jsonl"):
        rate = CONFIG.schedule.learning_rate(step - 1, peak=CONFIG.optimizer.lr)
        assert metrics["optim/lr"] == rate
        assert metrics["perf/flops_per_s"] > 0
        assert metrics["perf/peak_fraction"] == metrics["perf/flops_per_s"] / 1e9
        assert metrics["perf/tokens_per_s"] > 0


@pytest.mark.parametrize("stop_after", [1, 2, 3, 5, 6])
def test_an_interrupted_run_ends_bit_for_bit_as_an_uninterrupted_one(tmp_path, stop_after):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    fit(trainer_in(whole), whole)
    with pytest.raises(StoppedError):
        fit(trainer_in(parts), parts, stop_after=stop_after)
    resumed = trainer_in(parts)
    fit(resumed, parts)

    one, two = (CheckpointStore(folder).load() for folder in (whole, parts))
    assert one.step == two.step == 7
    assert one.tensors.keys() == two.tensors.keys()
    for name, tensor in one.tensors.items():
        assert torch.equal(tensor, two.tensors[name]), name
    assert json.dumps(logged(parts)) == json.dumps(logged(whole))
    for name, tensor in resumed.model.state_dict().items():
        assert torch.equal(tensor, model_weights(one)[name])


def test_resume_skips_a_damaged_checkpoint_and_ends_the_same(tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    fit(trainer_in(whole), whole)
    with pytest.raises(StoppedError):
        fit(trainer_in(parts), parts, stop_after=5)
    file = parts / "step-00000004" / "tensors.safetensors"
    raw = bytearray(file.read_bytes())
    raw[len(raw) // 2] ^= 1
    file.write_bytes(raw)
    resumed = trainer_in(parts)
    assert resumed.resume() == 2
    fit(trainer_in(parts), parts)
    one, two = (CheckpointStore(folder).load() for folder in (whole, parts))
    assert all(torch.equal(tensor, two.tensors[name]) for name, tensor in one.tensors.items())
    assert json.dumps(logged(parts)) == json.dumps(logged(whole))


def test_a_checkpoint_holds_master_weights_moments_and_selection_biases(tmp_path):
    trainer = fit(trainer_in(tmp_path), tmp_path)
    tensors = CheckpointStore(tmp_path).load().tensors
    biases = [name for name in tensors if name.endswith("e_score_correction_bias")]
    assert len(biases) == 3
    assert all(tensors[name].any() for name in biases)
    for name, _ in trainer.model.named_parameters():
        for key in ("model", "optimizer.exp_avg", "optimizer.exp_avg_sq", "optimizer.step"):
            assert tensors[f"{key}.{name}"].dtype == torch.float32


def test_a_run_that_diverges_stops_with_the_last_sound_weights(tmp_path):
    def poisoned(step):
        if step < 5:
            return batches(step)
        return [dataclasses.replace(part, mask=part.mask * torch.inf) for part in batches(step)]

    trainer = trainer_in(tmp_path, batches=poisoned)
    with pytest.raises(DivergenceError, match=r"not updated.*--training\.optimizer\.lr"):
        fit(trainer, tmp_path)
    assert trainer.step == 5
    assert CheckpointStore(tmp_path).steps() == [2, 4]
    assert [step for step, _ in logged(tmp_path)] == [1, 2, 3, 4, 5]
    sound = fit(
        trainer_in(tmp_path / "sound", dataclasses.replace(CONFIG, steps=5)), tmp_path / "sound"
    )
    for name, tensor in sound.model.state_dict().items():
        assert torch.equal(tensor, trainer.model.state_dict()[name]), name


def test_a_checkpoint_of_another_model_is_named(tmp_path):
    fit(trainer_in(tmp_path), tmp_path)
    other = dataclasses.replace(MODEL, hidden_size=48)
    with pytest.raises(
        CheckpointError, match=r"another model \(\d+ tensors differ, first .*name another"
    ):
        trainer_in(tmp_path, model_config=other).resume()


def test_bfloat16_products_keep_float32_masters_and_resume_exactly(tmp_path):
    config = dataclasses.replace(CONFIG, precision=PrecisionConfig(activations="bfloat16"))
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    trainer = fit(trainer_in(whole, config), whole)
    assert {p.dtype for p in trainer.model.parameters()} == {torch.float32}
    with pytest.raises(StoppedError):
        fit(trainer_in(parts, config), parts, stop_after=3)
    fit(trainer_in(parts, config), parts)
    assert json.dumps(logged(parts)) == json.dumps(logged(whole))
    plain = fit(trainer_in(tmp_path / "plain"), tmp_path / "plain")
    assert not torch.equal(plain.model.output_weight, trainer.model.output_weight)


class Warming:
    """An objective with a state: its loss grows with the batches it has seen."""

    mtp_depths = 0
    detach_mtp = False

    def __init__(self, model):
        self.plain = pretraining(model, mtp_loss_scaling=0.0)
        self.seen = torch.zeros((), dtype=torch.int64)

    def counts(self, batch):
        return self.plain.counts(batch)

    def loss(self, output, batch, counts):
        self.seen += 1
        total, metrics = self.plain.loss(output, batch, counts)
        return LossTerms(total * (1 + self.seen), metrics)

    def state_dict(self):
        return {"seen": self.seen}

    def load_state_dict(self, state):
        self.seen = state["seen"].clone()


def warming_trainer(folder):
    trainer = trainer_in(folder)
    return trainer_in(folder, objective=Warming(trainer.model))


def test_the_state_of_an_objective_is_kept_and_taken_up(tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    fit(warming_trainer(whole), whole)
    with pytest.raises(StoppedError):
        fit(warming_trainer(parts), parts, stop_after=3)
    fit(warming_trainer(parts), parts)
    one, two = (CheckpointStore(folder).load() for folder in (whole, parts))
    assert one.tensors["objective.seen"] == 14  # seven updates of two microbatches
    assert one.tensors.keys() == two.tensors.keys()
    for name, tensor in one.tensors.items():
        assert torch.equal(tensor, two.tensors[name]), name


def test_a_checkpoint_of_another_objective_is_named(tmp_path):
    fit(trainer_in(tmp_path), tmp_path)
    with pytest.raises(CheckpointError, match=r"another objective \(1 names .*'seen'"):
        warming_trainer(tmp_path).resume()
    fit(warming_trainer(tmp_path / "warming"), tmp_path / "warming")
    with pytest.raises(CheckpointError, match="another objective"):
        trainer_in(tmp_path / "warming").resume()


def test_another_optimizer_resumes_exactly_too(tmp_path):
    config = dataclasses.replace(CONFIG, optimizer=SGDConfig(lr=1e-1, momentum=0.5))
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    fit(trainer_in(whole, config), whole)
    with pytest.raises(StoppedError):
        fit(trainer_in(parts, config), parts, stop_after=3)
    fit(trainer_in(parts, config), parts)
    one, two = (CheckpointStore(folder).load() for folder in (whole, parts))
    assert any(name.startswith("optimizer.momentum_buffer.") for name in one.tensors)
    for name, tensor in one.tensors.items():
        assert torch.equal(tensor, two.tensors[name]), name
    with pytest.raises(CheckpointError, match="optimizer state 'exp_avg"):
        trainer_in(whole).resume()


def test_groups_are_frozen_and_slower(tmp_path):
    groups = (
        ParameterGroupConfig(name="router", parameters=("*.gate.weight",), is_frozen=True),
        ParameterGroupConfig(name="head", parameters=("lm_head.*",), lr_scale=1e-6),
    )
    trainer = fit(
        trainer_in(tmp_path, dataclasses.replace(CONFIG, parameter_groups=groups)), tmp_path
    )
    before = trainer_in(tmp_path / "new").model.state_dict()
    after = trainer.model.state_dict()
    moved = {name: (after[name] - before[name]).abs().max().item() for name in before}
    assert all(moved[name] == 0 for name in moved if name.endswith("gate.weight"))
    assert 0 < moved["lm_head.weight"] < 1e-6
    assert moved["backbone.embeddings.weight"] > 1e-3
    saved = CheckpointStore(tmp_path).load().tensors
    assert not any(name.startswith("optimizer.") and "gate.weight" in name for name in saved)


def test_a_bad_rate_of_the_biases_is_refused():
    with pytest.raises(ConfigError, match=r"bias_update_rate is -1.*0 or more"):
        dataclasses.replace(CONFIG, bias_update_rate=-1)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("steps", 0),
        ("batch_size", 0),
        ("microbatch_size", -1),
        ("seq_len", 0),
        ("evaluate_every_steps", 0),
        ("checkpoint_every_steps", 0),
        ("measure_every_steps", 0),
    ],
)
def test_counts_below_one_are_refused(field, value):
    with pytest.raises(ConfigError, match=rf"^{field} is {value}; it must be 1 or more"):
        dataclasses.replace(CONFIG, **{field: value})


def test_a_batch_is_a_whole_number_of_microbatches():
    with pytest.raises(ConfigError, match="microbatch_size is 3 and batch_size is 2"):
        dataclasses.replace(CONFIG, microbatch_size=3)


@pytest.mark.parametrize("lora", [None, LoRAConfig(rank=2, targets=("q_proj",))])
def test_what_the_loss_does_not_read_is_neither_trained_nor_said_to_be(tmp_path, lora):
    """Without a weight of the MTP depths their block stays as it is, and has no moments."""
    config = dataclasses.replace(CONFIG, bias_update_rate=0.0)

    def trained(scaling):
        model = LanguageModel.from_config(MODEL, seed=3)
        if lora is not None:
            add_lora(model, lora, seed=0)
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        trainer = Trainer(
            model,
            config,
            objective=pretraining(model, mtp_loss_scaling=scaling),
            batches=batches,
            evaluation=lambda _: {},
            store=CheckpointStore(tmp_path / str(scaling), retention=RetentionConfig()),
            peak_flops=1e9,
        )
        fit(trainer, tmp_path / str(scaling))
        changed = {n for n, t in model.state_dict().items() if not torch.equal(t, before[n])}
        kept = CheckpointStore(tmp_path / str(scaling), retention=RetentionConfig()).load().tensors
        moments = {
            name.partition("exp_avg.")[2] for name in kept if name.startswith("optimizer.exp_avg.")
        }
        return trained_by_part(model)["multi-token prediction"], changed, moments

    count, changed, moments = trained(0.0)
    assert count.trained == 0
    assert moments
    assert not [name for name in changed | moments if name.startswith("mtp.")]
    count, changed, moments = trained(0.3)
    assert count.trained > 0
    assert [name for name in changed if name.startswith("mtp.")]
    assert [name for name in moments if name.startswith("mtp.")]
