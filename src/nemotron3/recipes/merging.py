"""Merging the checkpoints of a run, in place of a decay of the learning rate.

During the stable phase of the schedule, a weighted average of recent checkpoints resembles a model
whose rate was decayed (Super report; Ultra's final base is such a merge over 500B tokens). Merging
needs checkpoints at equal intervals: keep them with `--retention.keep-every-steps`.
"""

import shutil
from itertools import pairwise
from pathlib import Path

import torch

from nemotron3.checkpoint.merging import MergeKind, merge_weights
from nemotron3.checkpoint.store import CheckpointStore
from nemotron3.config import read_run
from nemotron3.errors import ConfigError
from nemotron3.models import huggingface
from nemotron3.models.nemotron_h import LanguageModel
from nemotron3.recipes.pretrain import PretrainRun
from nemotron3.recipes.run_folder import TOKENIZER_FOLDER
from nemotron3.training.trainer import model_weights


def merge_run(folder: Path, out: Path, *, window_steps: int | None, kind: MergeKind) -> list[int]:
    """Write the merge of a run's last checkpoints as a model directory; returns their steps."""
    run = read_run(folder, PretrainRun)
    store = CheckpointStore(folder / "checkpoints", retention=run.retention)
    steps = store.steps()
    if window_steps is not None and steps:
        steps = [step for step in steps if step >= steps[-1] - window_steps]
    _require_even(steps, folder)
    model = LanguageModel.from_config(run.model, seed=run.seed)
    merged: dict[str, torch.Tensor] = {}
    for step, weight in zip(steps, merge_weights(kind, len(steps)), strict=True):
        for name, tensor in model_weights(store.load(step)).items():
            part = tensor.double() * weight
            merged[name] = merged[name] + part if name in merged else part
    model.load_state_dict({name: tensor.float() for name, tensor in merged.items()})
    if run.init_from is not None:
        model.companions = huggingface.read_directory(run.init_from, type(run.model))
    model.save_pretrained(out)
    shutil.copytree(folder / TOKENIZER_FOLDER, out, dirs_exist_ok=True)
    return steps


def _require_even(steps: list[int], folder: Path) -> None:
    gaps = {later - earlier for earlier, later in pairwise(steps)}
    if len(steps) < 2 or len(gaps) > 1:
        raise ConfigError(
            f"{folder} has checkpoints at steps {steps}; a merge needs two or more at equal "
            "distances. Train with --retention.keep-every-steps, or give another --window-steps"
        )
