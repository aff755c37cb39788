"""Weights on their way from a trainer to an engine that has its own copy, and proof of arrival.

    weights = PublishedWeights(model)          # the trainer's
    weights.publish(model, version=3)          # after the third update
    weights.write_into(engines_model)          # by the engine, between two of its steps

Stacks that overlap training and sampling have delivered stale weights for many updates while every
metric looked well. So both sides compute a checksum of all weights they hold, independently, and
`check_rollouts` compares them for every rollout that is trained on.
"""

import threading
import zlib
from collections.abc import Collection, Iterable, Mapping

import torch
from torch import Tensor, nn

from nemotron3.errors import DataError
from nemotron3.rl.rollouts import Rollout

_KEPT_CHECKSUMS = 64
"""Versions whose checksums are remembered; rollouts of older ones are far too stale."""
_ALIGNED = 64
"""Bytes; every shared tensor begins at a multiple."""
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@torch.no_grad()
def weights_checksum(model: nn.Module) -> int:
    """A checksum over the bits of every tensor of `state_dict`: one pass over memory.

    It is that of the sums of the tensors' bits, in the order of their names.
    """
    tensors = [tensor for _, tensor in sorted(model.state_dict().items())]
    sums = [t.contiguous().view(_BITS[t.element_size()]).sum(dtype=torch.int64) for t in tensors]
    return zlib.crc32(torch.stack(sums).cpu().numpy().tobytes())


class PublishedWeights:
    """The newest weights of a trainer, for an engine to copy when it has the time.

    It holds copies of the tensors that training may change. The trainer writes its next update
    while the engine still reads, so neither waits for the other longer than a copy takes.
    """

    def __init__(self, model: nn.Module, names: Collection[str] | None = None) -> None:
        """`names` are the tensors of `state_dict` that training may change.

        None stands for the trainable parameters of `model`, the trainer's, and its buffers.
        """
        frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
        state = model.state_dict()
        self.tensors: dict[str, Tensor] = {
            name: state[name].detach().clone()
            for name in (state.keys() - frozen if names is None else names)
        }
        self.lock = threading.Lock()
        """Held by whoever reads or writes `tensors`."""
        self.version = -1
        """Of the weights that were published last; -1 before the first."""
        self.checksums: dict[int, int] = {}
        """The trainer's own, by version."""

    def publish(self, model: nn.Module, version: int) -> None:
        """Copy the weights of `version` from the trainer's model."""
        checksum, state = weights_checksum(model), model.state_dict()
        with self.lock:
            for name, tensor in self.tensors.items():
                tensor.copy_(state[name].detach())
            self.checksums[version] = checksum
            while len(self.checksums) > _KEPT_CHECKSUMS:
                del self.checksums[min(self.checksums)]
            self.version = version

    def write_into(self, model: nn.Module) -> int:
        """Copy the newest weights into the tensors of an engine's model; returns their version."""
        with self.lock:
            _write(self.tensors, model)
            return self.version


class SharedWeights:
    """The same in memory that processes share; none reads it while the trainer's writes.

    All tensors are in one block, so it takes one file descriptor, and it may be sent to a process
    through a `multiprocessing` connection or as an argument.
    """

    def __init__(self, layout: Mapping[str, Tensor], block: Tensor | None = None) -> None:
        """`layout` are tensors of the names, shapes and dtypes that are shared."""
        places, end = dict[str, int](), 0
        for name, tensor in layout.items():
            places[name] = end
            end += -(-tensor.nbytes // _ALIGNED) * _ALIGNED
        self._block = (
            torch.empty(end, dtype=torch.uint8).share_memory_() if block is None else block
        )
        self.tensors: dict[str, Tensor] = {
            name: self._block[start : start + layout[name].nbytes]
            .view(layout[name].dtype)
            .view(layout[name].shape)
            for name, start in places.items()
        }
        self.version = -1
        """Of what `tensors` contain."""

    def __reduce__(self) -> tuple[object, ...]:
        layout = {name: tensor.to("meta") for name, tensor in self.tensors.items()}
        return SharedWeights, (layout, self._block), {"version": self.version}

    def copy(self, weights: PublishedWeights) -> int:
        """Copy the newest weights there; returns their version."""
        with weights.lock:
            for name, tensor in self.tensors.items():
                tensor.copy_(weights.tensors[name])
            self.version = weights.version
        return self.version

    def write_into(self, model: nn.Module) -> int:
        """Copy them into the tensors of an engine's model; returns their version."""
        _write(self.tensors, model)
        return self.version


def check_rollouts(
    rollouts: Iterable[Rollout],
    *,
    version: int,
    max_staleness: int,
    checksums: Mapping[int, int] | None = None,
) -> None:
    """Raise DataError unless every sampled token is of weights that update `version` may use.

    `version` is the number of updates that were made before this one. `checksums` are the
    trainer's, by version; None where engine and trainer share their memory.
    """
    for rollout in rollouts:
        for used in rollout.versions:
            if not version - max_staleness <= used <= version:
                raise DataError(
                    f"a rollout of {rollout.environment} for update {version + 1} has tokens of "
                    f"weights of version {used}; versions {version - max_staleness} to {version} "
                    "are allowed"
                )
            if checksums is None:
                continue
            ours, theirs = checksums.get(used), rollout.weight_checksums.get(used)
            if ours is None or ours != theirs:
                raise DataError(
                    f"a rollout of {rollout.environment} was sampled with weights of version "
                    f"{used} whose checksum in the engine is {_hex(theirs)}, and in the trainer "
                    f"{_hex(ours)}: the engine has other weights than it says"
                )


@torch.no_grad()
def _write(tensors: Mapping[str, Tensor], model: nn.Module) -> None:
    state = model.state_dict()
    for name, tensor in tensors.items():
        state[name].copy_(tensor)


def _hex(checksum: int | None) -> str:
    return "unknown" if checksum is None else f"{checksum:08x}"
