"""What training keeps in memory, part by part, computed on a model without memory.

Weights, gradients and optimizer moments are counted exactly. What forward and backward pass keep is
an upper bound, from what each mixer declares (`MixerConfig.kept_activations`), for the Triton and
the compiled CPU kernels. The sum of all parts is above the highest point of any update: with one
microbatch per update, gradients grow while activations go, and the sum of both is never reached.
Memory of the process itself, its libraries and the gaps between tensors come on top.

Products run in the dtype of their activations. A weight of another dtype is cast for that, and the
copy is kept for the backward pass; likewise the sum W + B A of a weight with a low-rank change.
Frozen weights beside such changes have the dtype of activations and are not cast. With `recompute`
there are the copies and activations of one block at a time.

Weights that are kept quantized beside changes have the bytes of their codes, and no copy: products
read the codes, or dequantize one matrix. Their experts go one by one, which keeps more activations.
"""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import nn

from nemotron3.models.block import Block
from nemotron3.models.config import ModelConfig
from nemotron3.models.lora import LoRAConfig
from nemotron3.models.lora.adapter import chosen_products
from nemotron3.models.nemotron_h import LanguageModel
from nemotron3.models.parameter import ParameterSpec, parameter_specs
from nemotron3.models.precision import rounded_weights
from nemotron3.ops import native
from nemotron3.ops.cross_entropy.torch import CACHED_LOGITS
from nemotron3.ops.weights.low_rank import SLICE
from nemotron3.runtime.memory import MemoryPart, MemoryPlan
from nemotron3.training.optimizers import AdamWConfig, OptimizerConfig, SGDConfig
from nemotron3.training.parameter_groups import group_of_parameters, is_read
from nemotron3.training.trainer import TrainingConfig

WEIGHTS, ADAPTER = "weights", "adapter"
GRADIENTS, MOMENTS = "gradients", "optimizer moments"
COPIES, ACTIVATIONS, LOSS, BACKWARD = (
    "cast or merged weights",
    "activations",
    "output layer and loss",
    "backward pass",
)
_LEAST_OF_ESTIMATE = 0.5
"""Of the upper bounds; in updates of small models it was 0.55 or more."""
_TOKENS_OF_SEQUENCE = 512
"""Of packed sequences, which each keep an initial state: assumed to be no shorter on average."""
_SHARE_FOR_LOGITS = 1 / 64
"""Of a GPU's memory (ops/cross_entropy/triton.py)."""
_DEQUANTIZING = 16
"""Bytes an element of a matrix that PyTorch's operations dequantize: codes, elements, scales."""
_OUTPUT_LAYER, _MTP = "lm_head", "mtp"


@dataclass(frozen=True, kw_only=True)
class LowRankPlan:
    """A low-rank change of some products, with everything else frozen."""

    rank: int
    is_adapted: Callable[[str], bool]
    """Whether the product of a name, such as `backbone.layers.0.mixer.in_proj`, has a change."""
    quantized: Mapping[str, int] = field(default_factory=dict)
    """Bytes of the weights that stay quantized, by the names of their parameters."""


def low_rank_plan(
    config: ModelConfig, lora: LoRAConfig, quantized: Mapping[str, int] | None = None
) -> LowRankPlan:
    """That of an adapter; ConfigError for a target that names no product of the model."""
    with torch.device("meta"):
        adapted = chosen_products(LanguageModel(config), lora.targets)
    return LowRankPlan(rank=lora.rank, is_adapted=adapted.__contains__, quantized=quantized or {})


def training_parts(
    config: ModelConfig,
    training: TrainingConfig,
    *,
    mtp_depths: int,
    low_rank: LowRankPlan | None = None,
    rounded: Collection[str] = (),
    gpu_bytes: int | None = None,
) -> list[MemoryPart]:
    """The parts of training a model; `gpu_bytes` is a GPU's whole memory, None for a CPU.

    `mtp_depths` is the number of MTP depths in the loss, `Objective.mtp_depths`; `rounded` are the
    names of parameters that products take rounded, beside those of a recipe of few bits.
    """
    with torch.device("meta"):
        model = LanguageModel(config)
    parameters = _Parameters(
        model,
        training,
        low_rank,
        mtp_depths=mtp_depths,
        rounded=rounded,
        on_cpu=gpu_bytes is None,
    )
    tokens = training.microbatch_size * training.seq_len
    sequences = max(training.microbatch_size, -(-tokens // _TOKENS_OF_SEQUENCE))
    dtype = training.precision.dtype
    passes = _passes(model, mtp_depths)
    kept = [
        block.kept_bytes(tokens, sequences, dtype) + parameters.kept_apart_bytes(block, tokens)
        for block in passes
    ]
    copies = [parameters.copied_bytes(block) for block in passes]
    inputs = [block.input_bytes(tokens, dtype) for block in passes]
    final = 2 * tokens * config.hidden_size * dtype.itemsize  # the last norm's input and result
    held = sum(inputs) + max(kept) if training.recompute else sum(inputs) + sum(kept)
    held_copies = max(copies) if training.recompute else sum(copies)
    loss = _loss_bytes(parameters, tokens, 1 + mtp_depths, dtype, gpu_bytes)
    backward = max(kept) + parameters.backward_bytes(passes)
    return [
        MemoryPart(name=WEIGHTS, num_bytes=parameters.weight_bytes),
        MemoryPart(name=ADAPTER, num_bytes=parameters.adapter_bytes),
        MemoryPart(name=GRADIENTS, num_bytes=4 * parameters.num_trained),
        MemoryPart(name=MOMENTS, num_bytes=parameters.moment_bytes(training.optimizer)),
        MemoryPart(name=COPIES, num_bytes=held_copies, is_estimate=True),
        MemoryPart(name=ACTIVATIONS, num_bytes=held + final, is_estimate=True),
        MemoryPart(name=LOSS, num_bytes=loss, is_estimate=True),
        MemoryPart(name=BACKWARD, num_bytes=backward, is_estimate=True),
    ]


def least_bytes(plan: MemoryPlan) -> int:
    """What training that is planned so needs at least, by half of the upper bounds.

    Parts that are made smaller where memory is short count nothing.
    With one microbatch per update, the first gradient comes when most activations have gone.
    """
    gradients = sum(part.num_bytes for part in plan.parts if part.name == GRADIENTS)
    estimates = plan.total - plan.certain - plan.elastic
    return max(plan.certain, plan.certain - gradients + int(_LEAST_OF_ESTIMATE * estimates))


def merged_copy_bytes(config: ModelConfig, low_rank: LowRankPlan, dtype: torch.dtype) -> int:
    """Of what an engine's model has of its own: copies of all adapted weights with their changes,
    in the dtype of activations; of quantized ones, copies of the changes."""
    with torch.device("meta"):
        model = LanguageModel(config)
    specs = parameter_specs(model)
    return sum(
        4 * sum(part.numel() for part in _changes(parameter.shape, low_rank.rank))
        if name in low_rank.quantized
        else parameter.numel() * dtype.itemsize
        for name, parameter in model.named_parameters()
        if specs[name].quantizes and low_rank.is_adapted(_product(name))
    )


@dataclass(frozen=True)
class _Pass:
    """One block of the backbone, or the MTP block at one depth, in a forward pass."""

    prefix: str
    """Of its parameters' names."""
    blocks: Sequence[Block]
    width: int
    """Of the residual stream."""
    own_width: int
    """Of what it keeps beside its blocks: the norms and the projection of an MTP depth."""
    input_width: int

    def input_bytes(self, tokens: int, dtype: torch.dtype) -> int:
        return tokens * self.input_width * dtype.itemsize

    def kept_bytes(self, tokens: int, sequences: int, dtype: torch.dtype) -> int:
        total = tokens * self.own_width * dtype.itemsize
        for block in self.blocks:
            kept = block.kind.kept_activations(self.width, dtype)
            total += tokens * kept.per_token + sequences * kept.per_sequence
        return total


def _passes(model: LanguageModel, mtp_depths: int) -> list[_Pass]:
    width = model.config.hidden_size
    passes = [
        _Pass(f"backbone.layers.{index}.", [block], width, 0, width)
        for index, block in enumerate(_blocks(model.backbone.layers))
    ]
    if model.mtp is not None and mtp_depths:
        blocks = _blocks(model.mtp.layers)
        # Both halves joined, each block's input, and the final norm's; the halves come from before.
        own = (2 + len(blocks) + 1) * width
        passes += [_Pass(f"{_MTP}.", blocks, width, own, 2 * width)] * mtp_depths
    return passes


def _blocks(layers: nn.ModuleList) -> list[Block]:
    return [layer for layer in layers if isinstance(layer, Block)]


class _Parameters:
    """The parameters of a run: what is trained, and in which dtype the rest is kept."""

    def __init__(
        self,
        model: LanguageModel,
        training: TrainingConfig,
        low_rank: LowRankPlan | None,
        *,
        mtp_depths: int,
        rounded: Collection[str],
        on_cpu: bool,
    ) -> None:
        self.specs = parameter_specs(model)
        self.shapes = {name: p.shape for name, p in model.named_parameters()}
        self.buffer_bytes = sum(4 * b.numel() for b in model.buffers())
        self.low_rank = low_rank
        self.quantized: Mapping[str, int] = low_rank.quantized if low_rank else {}
        moe = model.config.moe
        self.choices = moe.num_experts_per_tok if moe is not None else 0
        self.dtype = training.precision.dtype
        """That of activations, and so of products."""
        self.is_compiled_narrow = on_cpu and self.dtype == torch.bfloat16 and native.available()
        """Whether compiled products are in bfloat16, which read float32 weights without a copy."""
        self.rounded = rounded_weights(model, training.precision).union(rounded)
        self.dequantized = frozenset(rounded)
        """Those that are dequantized in each pass."""
        members = group_of_parameters(model, training.parameter_groups)
        read = [name for name in self.shapes if is_read(name, mtp_depths=mtp_depths)]
        frozen = {name for name in read if name in members and members[name].is_frozen}
        self.trained = [] if low_rank else [name for name in read if name not in frozen]
        self.adapted = {
            name
            for name, spec in self.specs.items()
            if low_rank and spec.quantizes and low_rank.is_adapted(_product(name))
        }
        self.trained_changes = self.adapted.intersection(read)
        self.output = "backbone.embeddings.weight"
        if f"{_OUTPUT_LAYER}.weight" in self.shapes:
            self.output = f"{_OUTPUT_LAYER}.weight"

    @property
    def weight_bytes(self) -> int:
        """Of the model's own parameters and buffers."""
        trained = set(self.trained)
        parts = (
            shape.numel() * (4 if name in trained else self._dtype(name).itemsize)
            for name, shape in self.shapes.items()
            if name not in self.quantized
        )
        return sum(parts) + sum(self.quantized.values()) + self.buffer_bytes

    @property
    def adapter_bytes(self) -> int:
        """Of the changes of adapted products, in float32."""
        return 4 * self._num_changes(self.adapted)

    @property
    def num_trained(self) -> int:
        """Elements with a gradient."""
        own = sum(self.shapes[name].numel() for name in self.trained)
        return own + self._num_changes(self.trained_changes)

    def moment_bytes(self, optimizer: OptimizerConfig) -> int:
        """Of the optimizer's state: float32, and AdamW's counter of steps for each tensor."""
        tensors = len(self.trained) + 2 * len(self.trained_changes)
        match optimizer:
            case AdamWConfig():
                return 2 * 4 * self.num_trained + 4 * tensors
            case SGDConfig(momentum=momentum):
                return 4 * self.num_trained if momentum else 0

    def copied_bytes(self, block: _Pass) -> int:
        """Of products' weights that a pass computes and keeps: cast, or with a change added, or
        rounded to few bits."""
        return sum(
            self.shapes[name].numel() * self.dtype.itemsize
            for name in self._products(block.prefix)
            if name not in self.quantized
            and (name in self.rounded or name in self.adapted or self._is_cast(name))
        )

    def kept_apart_bytes(self, block: _Pass, tokens: int) -> int:
        """Of what products with quantized weights keep beyond those of plain ones: the `rank`
        numbers of each row, and of experts each one's inputs, hidden units and their products."""
        total = 0
        for name in self._products(block.prefix):
            if name not in self.quantized:
                continue
            *experts, _, d_in = self.shapes[name]
            rank = self.low_rank.rank if self.low_rank and name in self.adapted else 0
            if experts:
                total += tokens * self.choices * (2 * d_in + 2 * rank)
            else:
                total += tokens * 2 * rank
        return total * self.dtype.itemsize

    def backward_bytes(self, passes: Iterable[_Pass]) -> int:
        """Most bytes of gradients on their way: a new one beside the sum, and its narrow form.

        Beside an adapter, those of the sums of a block, and slices of one in float32; or the
        largest quantized matrix, or rounded parameter, while it is dequantized.
        """
        narrow = self.dtype.itemsize if self.dtype.itemsize < 4 else 0
        largest = max((self.shapes[name].numel() for name in self.trained), default=0)
        blocks = [self._products(block.prefix) for block in passes]
        added = self.adapted - self.quantized.keys()
        sums = [[self.shapes[n].numel() for n in names if n in added] for names in blocks]
        slices = max(
            (_slice_bytes(self.shapes[n]) for n in self.trained_changes.intersection(added)),
            default=0,
        )
        # Compiled products add gradients up in float32, and those of a narrow sum are then cast.
        of_sums = (self.dtype.itemsize + 4 * self.is_compiled_narrow) * max(
            map(sum, sums), default=0
        )
        matrices = [self.shapes[name][-2:].numel() for name in self.quantized]
        matrices += [self.shapes[name].numel() for name in self.dequantized]
        matrix = max(matrices, default=0)
        return max(largest * (4 + narrow), of_sums + slices, matrix * _DEQUANTIZING)

    @property
    def is_output_trained(self) -> bool:
        """Whether the output layer has a gradient."""
        return self.output in self.trained or self.output in self.adapted

    def dtype_of_output(self) -> torch.dtype:
        return self._dtype(self.output)

    def _products(self, prefix: str) -> Iterable[str]:
        return (n for n, spec in self.specs.items() if spec.quantizes and n.startswith(prefix))

    def _is_cast(self, name: str) -> bool:
        """Whether products take a copy of a weight in their dtype."""
        own = self._dtype(name)
        is_read_wide = self.is_compiled_narrow and own == torch.float32
        return own != self.dtype and not is_read_wide

    def _dtype(self, name: str) -> torch.dtype:
        spec: ParameterSpec = self.specs[name]
        return spec.dtype(torch.float32, self.dtype if self.low_rank else None)

    def _num_changes(self, names: Iterable[str]) -> int:
        return sum(part.numel() for name in names for part in self._changes(name))

    def _changes(self, name: str) -> tuple[torch.Size, torch.Size]:
        assert self.low_rank is not None
        return _changes(self.shapes[name], self.low_rank.rank)


def _changes(shape: torch.Size, rank: int) -> tuple[torch.Size, torch.Size]:
    """The shapes of A and B beside a weight."""
    *experts, d_out, d_in = shape
    return torch.Size((*experts, rank, d_in)), torch.Size((*experts, d_out, rank))


def _product(name: str) -> str:
    """A product's name from its parameter's: that of stacked experts is the parameter's own."""
    return name.removesuffix(".weight")


def _slice_bytes(shape: torch.Size) -> int:
    """Of the float32 copies of a slice in which a change is added to a weight of this shape."""
    return 2 * 4 * min(shape.numel(), max(SLICE, shape[1:].numel()))


def _loss_bytes(
    parameters: _Parameters, tokens: int, heads: int, dtype: torch.dtype, gpu_bytes: int | None
) -> int:
    """Gradients that a loss makes on its way, of hidden states and output layer, and its logits.

    An adapted output layer is added up in float32, where all heads' gradients meet.
    """
    vocab, width = parameters.shapes[parameters.output]
    d_weight = 4 * vocab * width if parameters.is_output_trained else 0
    d_hidden = tokens * width * dtype.itemsize
    if gpu_bytes is None:
        logits = 4 * min(tokens * vocab, max(CACHED_LOGITS, vocab))
    else:
        logits = min(tokens * vocab * dtype.itemsize, int(gpu_bytes * _SHARE_FOR_LOGITS))
    narrow = vocab * width * dtype.itemsize
    is_adapted = parameters.output in parameters.adapted
    is_wide = is_adapted or parameters.output in parameters.quantized
    merged = 4 * vocab * width if is_wide else 0
    held = torch.float32 if is_wide else parameters.dtype_of_output()
    cast = narrow if held != dtype else 0
    product = narrow if d_weight and dtype.itemsize < 4 else 0
    return heads * (d_weight + d_hidden) + logits + merged + cast + product
