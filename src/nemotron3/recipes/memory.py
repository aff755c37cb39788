"""The memory of a run: planned before it begins, said in a line, refused where it cannot fit.

A GPU's memory is the run's alone, so what forward and backward pass keep counts, by half of its
upper bound. The host can swap, and frees what others hold, so there only what is certain counts:
weights, gradients and optimizer moments.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from nemotron3.checkpoint import ShardedReader
from nemotron3.errors import ConfigError
from nemotron3.inference.config import EngineConfig
from nemotron3.inference.engine.memory import KEYS_AND_VALUES, engine_parts
from nemotron3.models import huggingface
from nemotron3.models.config import ModelConfig
from nemotron3.models.nemotron_h import LanguageModel
from nemotron3.models.precision import apply_precision
from nemotron3.ops.weights import QuantizedWeight
from nemotron3.recipes.memory_remedies import Remedy, Settings, find_remedy
from nemotron3.recipes.pretrain import PretrainRun
from nemotron3.recipes.rl import RLRun
from nemotron3.recipes.run_folder import RunCallback
from nemotron3.recipes.sft import SFTRun
from nemotron3.runtime.devices import has_memory_of_its_own
from nemotron3.runtime.memory import (
    MemoryPart,
    MemoryPlan,
    in_units,
    plan_of,
    usable_memory_bytes,
)
from nemotron3.training.memory_plan import (
    WEIGHTS,
    LowRankPlan,
    least_bytes,
    low_rank_plan,
    merged_copy_bytes,
    training_parts,
)
from nemotron3.training.trainer import TrainingConfig

_GPU_SHARE, _LEAST_GPU_SHARE = 0.9, 0.05
"""Of a GPU's memory, what a plan may fill, and what keys and values have at least."""
_NAMED = 3
MERGED = "engine merged weights"
"""Of an engine by the trainer's side: copies of the weights that an adapter changes."""


def announce_memory(
    run: PretrainRun | SFTRun | RLRun, device: torch.device, callback: RunCallback
) -> None:
    """Say what a run will keep in memory; ConfigError where the device cannot hold it."""
    announce_plan(
        run_plan(run, device),
        device,
        callback,
        remedy=lambda usable: _remedy(run, device, usable),
    )


def announce_plan(
    plan: MemoryPlan,
    device: torch.device,
    callback: RunCallback,
    *,
    remedy: Callable[[int], Remedy | None],
) -> None:
    """Say what a plan needs; ConfigError where the device cannot hold it.

    `remedy` finds the settings with which it could, for the bytes that can be used.
    """
    usable = usable_memory_bytes(device)
    check_memory(plan, device, usable, remedy=lambda: remedy(usable or 0))
    of = "" if usable is None else f" of {in_units(usable)}"
    callback.stage(f"Memory, at most about {in_units(plan.total)}{of}: {plan.line()}")


def _remedy(run: PretrainRun | SFTRun | RLRun, device: torch.device, usable: int) -> Remedy | None:
    settings = Settings(run.training, None if isinstance(run, PretrainRun) else run.lora)
    if isinstance(run, RLRun):
        settings = settings._replace(max_num_seqs=run.max_num_seqs)
    return find_remedy(
        settings,
        lambda changed: run_plan(_changed(run, changed), device),
        _model_config(run),
        usable=usable,
        needed=lambda plan: needed_bytes(plan, device),
        may_adapt=not isinstance(run, PretrainRun),
        least_tokens=run.rollouts.max_context - 1 if isinstance(run, RLRun) else 1,
    )


def _changed(run: PretrainRun | SFTRun | RLRun, settings: Settings) -> PretrainRun | SFTRun | RLRun:
    if isinstance(run, PretrainRun):
        return replace(run, training=settings.training)
    if isinstance(run, SFTRun):
        return replace(run, training=settings.training, lora=settings.lora)
    seqs = settings.max_num_seqs
    assert seqs is not None
    return replace(run, training=settings.training, lora=settings.lora, max_num_seqs=seqs)


def _model_config(run: PretrainRun | SFTRun | RLRun) -> ModelConfig:
    return run.model if isinstance(run, PretrainRun) else huggingface.read_config(run.model)


def run_plan(run: PretrainRun | SFTRun | RLRun, device: torch.device) -> MemoryPlan:
    """What a run keeps in the memory of its device at its highest point."""
    config = _model_config(run)
    depths = config.pattern.num_mtp_depths if run.loss.mtp_loss_scaling else 0
    lora = None if isinstance(run, PretrainRun) else run.lora
    low_rank = None
    if lora is not None and not isinstance(run, PretrainRun):
        low_rank = low_rank_plan(config, lora, quantized_bytes(run.model))
    if not isinstance(run, RLRun):
        return memory_plan(config, run.training, device, mtp_depths=depths, low_rank=low_rank)
    # Beside an adapter, the reference is the frozen model itself.
    has_own = run.loss.kl and low_rank is None
    reference = ShardedReader(run.model).total_bytes if has_own else 0
    plan = memory_plan(
        config,
        run.training,
        device,
        mtp_depths=depths,
        low_rank=low_rank,
        engine=run.engine_config(),
        reference_bytes=reference,
    )
    return plan_of([*plan.parts, *_copy_parts(plan, run, device)])


def quantized_bytes(path: str | Path) -> dict[str, int]:
    """Bytes of the weights that a directory holds quantized, by the names of their parameters.

    Of a name that is no directory with weights there are none.
    """
    if not any(Path(path).glob("*.safetensors")):
        return {}
    with torch.device("meta"):
        model = LanguageModel(huggingface.read_config(path))
        huggingface.use_stored_formats(model, path, None)
    return {n: m.nbytes for n, m in model.named_modules() if isinstance(m, QuantizedWeight)}


def _num_engines(run: RLRun) -> tuple[int, int]:
    """Engines of a run, and how many of them have a copy of the weights."""
    engines = max(1, run.engines.num_processes)
    return engines, engines if run.asynchronous.is_ahead else run.engines.num_processes


def _copy_parts(plan: MemoryPlan, run: RLRun, device: torch.device) -> list[MemoryPart]:
    """Engines beside the first one, their weights, and the copies of these on their way to them.

    Beside an adapter, merged weights alone are on their way, and in a thread the rest is shared.
    """
    engines, copies = _num_engines(run)
    if not copies:
        return []
    sizes = {part.name: part.num_bytes for part in plan.parts}
    merged = sizes.get(MERGED)
    parts = [
        replace(part, name=f"further {part.name}", num_bytes=(engines - 1) * part.num_bytes)
        for part in plan.parts
        if part.name.startswith("engine ") and part.name != MERGED
    ]
    changed = sizes[WEIGHTS] if merged is None else merged
    own = sizes[WEIGHTS] if run.engines.num_processes else changed
    parts.append(MemoryPart(name="engines' weights", num_bytes=copies * own))
    parts.append(MemoryPart(name="published weights", num_bytes=changed))
    if run.engines.num_processes and not has_memory_of_its_own(device):
        parts.append(MemoryPart(name="shared weights", num_bytes=changed))
    return parts


def bytes_for_keys(run: RLRun, device: torch.device) -> int | None:
    """What an engine may take for keys and values; None where it may decide by what is free.

    It is made before the trainer has gradients and moments, so on a GPU the plan leaves them room.
    """
    if not has_memory_of_its_own(device):
        return None
    plan, usable = run_plan(run, device), usable_memory_bytes(device)
    assert usable is not None
    wanted = sum(part.num_bytes for part in plan.parts if part.name == KEYS_AND_VALUES)
    if not wanted:
        return None
    engines, _ = _num_engines(run)
    left = (int(_GPU_SHARE * usable) - (plan.total - engines * wanted)) // engines
    return min(wanted, max(left, int(_LEAST_GPU_SHARE * usable)))


def memory_plan(
    config: ModelConfig,
    training: TrainingConfig,
    device: torch.device,
    *,
    mtp_depths: int = 0,
    low_rank: LowRankPlan | None = None,
    engine: EngineConfig | None = None,
    reference_bytes: int = 0,
    device_bytes: int | None = None,
) -> MemoryPlan:
    """What training keeps, with an engine beside it that plays rollouts, and a frozen reference.
    `device_bytes` is the memory of a GPU that this machine need not have.
    """
    gpu_bytes = None
    if has_memory_of_its_own(device):
        gpu_bytes = device_bytes or usable_memory_bytes(device)
    parts = training_parts(
        config, training, mtp_depths=mtp_depths, low_rank=low_rank, gpu_bytes=gpu_bytes
    )
    if engine is not None:
        with torch.device("meta"):
            model = LanguageModel(config)
        apply_precision(model, training.precision)
        length = engine.max_model_len or config.max_position_embeddings
        parts += engine_parts(model, engine, device, length)
        # An engine's model has merged copies of the weights that an adapter changes, or its own
        # copy of what stands beside quantized ones.
        dtype = training.precision.dtype
        copies = 0 if low_rank is None else merged_copy_bytes(config, low_rank, dtype)
        parts.append(MemoryPart(name=MERGED, num_bytes=copies))
    parts.append(MemoryPart(name="reference model", num_bytes=reference_bytes))
    return plan_of(parts)


def needed_bytes(plan: MemoryPlan, device: torch.device) -> int:
    """What a device must have at least: nothing that fits is refused."""
    if not has_memory_of_its_own(device):
        return plan.certain
    return least_bytes(plan)


def check_memory(
    plan: MemoryPlan,
    device: torch.device,
    usable: int | None,
    *,
    remedy: Callable[[], Remedy | None],
) -> None:
    """Raise ConfigError where a device cannot hold a plan; it names the largest parts.

    `remedy` finds the settings with which it could.
    """
    needed = needed_bytes(plan, device)
    if usable is None or needed <= usable:
        return
    largest = ", ".join(f"{part.name} {in_units(part.num_bytes)}" for part in plan.largest[:_NAMED])
    found = remedy()
    what = "take a smaller model, or a device with more memory"
    if found is not None:
        what = f"it would fit with {found.text()}"
    raise ConfigError(
        f"the run needs {in_units(needed)} of memory at least and {device.type} has "
        f"{in_units(usable)} ({largest}); {what}"
    )
