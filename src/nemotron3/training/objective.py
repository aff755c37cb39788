"""The loss of a batch: the part in which stages of training differ.

Pre-training, fine-tuning, reinforcement learning, preferences and distillation share the loop, the
update, checkpoints and logs. They differ in the loss, which an `Objective` defines. For each global
batch the step calls it twice:

1. `counts`: the divisors of the loss. A microbatch, or a rank, has only a part of the batch, so the
   sums over all parts are computed before the first forward pass. Loss and gradient are then the
   same for any split into microbatches and for any packing.
2. `loss`: the share of one microbatch, from its forward pass. It runs inside that pass (it is the
   model's `head`), where the output layer's matrix is whole even if the model is sharded.

An objective with a state of its own, such as a moving baseline, is `Stateful`; checkpoints save it.
"""

from collections.abc import Mapping
from typing import NamedTuple, Protocol, TypeVar, runtime_checkable

from jaxtyping import Float
from torch import Tensor

from nemotron3.models.nemotron_h import ModelOutput
from nemotron3.training.batch import TrainBatch

BatchT = TypeVar("BatchT", bound=TrainBatch)
BatchT_contra = TypeVar("BatchT_contra", bound=TrainBatch, contravariant=True)


class LossTerms(NamedTuple):
    """The contribution of one microbatch to its global batch."""

    total: Float[Tensor, ""]
    """Its share of the loss: the part that carries gradients."""
    metrics: dict[str, Float[Tensor, ""]]
    """Its shares of the metrics, detached, under the same names in every microbatch; a metric is
    the sum of its shares. Names are complete: `train/loss`."""


class Objective(Protocol[BatchT_contra]):
    """The loss of a batch of one kind."""

    @property
    def mtp_depths(self) -> int:
        """Depths of multi-token prediction that the loss reads; 0 leaves the MTP block out."""
        ...

    @property
    def detach_mtp(self) -> bool:
        """Whether the losses of the MTP depths train only the MTP block."""
        ...

    def counts(self, batch: BatchT_contra) -> dict[str, float]:
        """A microbatch's part of the normalisers, under the same names in every microbatch."""
        ...

    def loss(
        self, output: ModelOutput, batch: BatchT_contra, counts: Mapping[str, float]
    ) -> LossTerms:
        """The share of one microbatch; `counts` are those of the global batch."""
        ...


@runtime_checkable
class Stateful(Protocol):
    """An objective with state that changes during training."""

    def state_dict(self) -> dict[str, Tensor]:
        """Its state by name; the names are the same at every step."""
        ...

    def load_state_dict(self, state: dict[str, Tensor], /) -> None:
        """Restore the result of `state_dict`."""
        ...
