"""Weighted averages of checkpoints that approximate a learning-rate decay.

With a constant rate, the difference between the oldest checkpoint theta_0 and the newest theta_k is
a sum of increments, one per interval. A decaying rate would have made increment i smaller by a
factor w_i, so the decayed model is about (Tian et al. 2025, arXiv 2507.17634)

    theta = theta_0 + sum_i w_i (theta_i - theta_{i-1}) = sum_j c_j theta_j
    c_k = w_k,   c_j = w_j - w_{j+1},   c_0 = 1 - w_1.

The sources do not say at which point of its interval w_i is the decay. Here it is the mean over the
interval: the value at its end would give the newest checkpoint no weight (every decay ends at
zero), the value at its start would give the oldest none. For an increment that grows evenly within
its interval the mean is exact.

Tensors are merged one by one in float64: besides the shard that is being written, only one tensor
of a checkpoint and its running sum are in memory.
"""

import math
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from nemotron3.checkpoint.safetensors import INDEX_FILE, ShardedReader, ShardedWriter
from nemotron3.errors import CheckpointError, ConfigError

MergeKind = Literal["minus_sqrt", "linear", "uniform"]

# The area under each decay from 0 to r.
_AREAS: dict[str, Callable[[float], float]] = {
    "minus_sqrt": lambda r: r - 2.0 / 3.0 * r * math.sqrt(r),
    "linear": lambda r: r - r * r / 2.0,
}


def merge_weights(kind: MergeKind, count: int) -> list[float]:
    """The weight of each of `count` checkpoints at equal intervals, oldest first; they sum to 1."""
    if count < 1:
        raise ConfigError(f"a merge of {count} checkpoints is empty; give at least one")
    if kind == "uniform":
        return [1.0 / count] * count
    if kind not in _AREAS:
        raise ConfigError(
            f"merge kind is {kind!r}; it must be one of 'minus_sqrt', 'linear', 'uniform'"
        )
    area = _AREAS[kind]
    k = count - 1
    w = [k * (area((i + 1) / k) - area(i / k)) for i in range(k)]  # w[i] is the docstring's w_{i+1}
    return [before - after for before, after in zip([1.0, *w], [*w, 0.0], strict=True)]


def merge_checkpoints(
    sources: Sequence[Path], destination: Path, *, kind: MergeKind = "minus_sqrt"
) -> None:
    """Merge model directories, oldest first, into a new one.

    Shapes, dtypes and files other than the weights (configuration, tokenizer) are the newest's.
    Tensors that are not floating-point must be equal in all.
    """
    weights = merge_weights(kind, len(sources))
    if destination.resolve() in [source.resolve() for source in sources]:
        raise ConfigError(f"{destination} is one of the sources; merge into another directory")
    readers = [ShardedReader(source) for source in sources]
    newest = readers[-1]
    for reader in readers[:-1]:
        _require_same_tensors(reader, newest)
    with ShardedWriter(destination, total_bytes=newest.total_bytes) as writer:
        for name in newest.names:
            writer.add(name, _merge_tensor(name, readers, weights))
    for file in newest.directory.iterdir():
        if file.is_file() and not file.name.endswith((".safetensors", INDEX_FILE)):
            shutil.copyfile(file, destination / file.name)


def _merge_tensor(name: str, readers: Sequence[ShardedReader], weights: Sequence[float]) -> Tensor:
    """One tensor of the merge, in its stored dtype."""
    newest = readers[-1].load(name)
    if not newest.is_floating_point():
        for reader in readers[:-1]:
            if not torch.equal(reader.load(name), newest):
                raise CheckpointError(
                    f"tensor {name!r} is {newest.dtype} and differs between {reader.directory} "
                    f"and {readers[-1].directory}; it has no average, merge checkpoints of one run"
                )
        return newest
    total = weights[-1] * newest.double()
    for reader, weight in zip(readers[:-1], weights[:-1], strict=True):
        total.add_(reader.load(name).double(), alpha=weight)
    return total.to(newest.dtype)


def _require_same_tensors(reader: ShardedReader, newest: ShardedReader) -> None:
    """Raise CheckpointError unless both directories have the same names, shapes and dtypes."""
    difference = sorted(set(reader.names) ^ set(newest.names))
    if difference:
        raise CheckpointError(
            f"{reader.directory} and {newest.directory} do not hold the same tensors: "
            f"{len(difference)} differ, first {difference[0]!r}; merge checkpoints of one model"
        )
    for name in newest.names:
        ours, theirs = newest.info(name), reader.info(name)
        if (ours.shape, ours.dtype) != (theirs.shape, theirs.dtype):
            raise CheckpointError(
                f"tensor {name!r} is {theirs.dtype} {list(theirs.shape)} in {theirs.file} and "
                f"{ours.dtype} {list(ours.shape)} in {ours.file}; merge checkpoints of one model"
            )
