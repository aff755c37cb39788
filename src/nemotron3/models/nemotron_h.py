"""The language model: embedding, a stack of blocks, a final norm, an output layer, and MTP.

Training, evaluation and generation use the same forward pass; they differ in the layout of the
batch, and in whether a state is carried.

    model = LanguageModel.from_config(ModelConfig.preset("tiny"), seed=0)
    model(tokens)                                             # [batch, seq] -> [batch, seq, vocab]
    model(stream, layout=SequenceLayout.packed([5, 3]))       # [8] -> [8, vocab], two documents
    model(stream, layout=layout, head=loss, mtp_depths=2)     # loss(ModelOutput), without logits
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple, TypeVar, overload

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from nemotron3.errors import ConfigError
from nemotron3.models import huggingface
from nemotron3.models.allocation import allocate
from nemotron3.models.block import Block
from nemotron3.models.cache.hybrid_cache import HybridCache
from nemotron3.models.cache.state_precision import StatePrecision
from nemotron3.models.config import ModelConfig
from nemotron3.models.experts import Router, Routing
from nemotron3.models.initialization import initialize
from nemotron3.models.layout import SequenceLayout, shift_left
from nemotron3.models.linear import Embedding, Linear
from nemotron3.models.mixer import last_stateful_layer
from nemotron3.models.mtp import MultiTokenPredictor
from nemotron3.models.norm import RMSNorm
from nemotron3.models.routes import RecordedRoutes
from nemotron3.ops.low_precision import RoundingPosition
from nemotron3.ops.products import dense
from nemotron3.ops.weights import ComputedWeight, Weight, WeightFormat

T = TypeVar("T")


class BackboneOutput(NamedTuple):
    """Outputs of the backbone."""

    hidden: Float[Tensor, "tokens d_model"]
    """The residual stream after the final norm."""
    routings: list[Routing]
    """Decisions of the routers, first MoE layer to last."""
    residual_rms: list[Tensor]
    """Root mean square of the residual stream after each block; empty without `measure`."""


class ModelOutput(NamedTuple):
    """The input of a head: hidden states, and the matrix of the output layer."""

    hidden: list[Float[Tensor, "tokens d_model"]]
    """After the final norm: of the backbone, then of each requested MTP depth."""
    output_weight: Weight
    """The output layer's matrix [vocab, d_model], unsharded; all depths share it."""
    routings: list[Routing]
    """Decisions of the backbone's routers, first MoE layer to last."""
    mtp_routings: list[list[Routing]]
    """Decisions of the MTP block's routers, for each depth."""
    residual_rms: list[Tensor]
    """Root mean square of the residual stream after each block; empty without `measure`."""

    @property
    def routes(self) -> RecordedRoutes:
        """The chosen experts, to be replayed by another pass."""
        return RecordedRoutes(
            backbone=[routing.indices for routing in self.routings],
            mtp=[[routing.indices for routing in depth] for depth in self.mtp_routings] or None,
        )


Head = Callable[[ModelOutput], T]
"""Computes the result of a forward pass from its hidden states, for example a loss."""


class Backbone(nn.Module):
    """Embedding, blocks and final norm."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.embeddings = Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(kind, config) for kind in config.layers)
        self.last_stateful_layer = last_stateful_layer(config.layers)
        self.norm_f = RMSNorm(config.hidden_size, config.layer_norm_epsilon)

    def forward(
        self,
        x: Float[Tensor, "tokens d_model"],
        layout: SequenceLayout,
        state: HybridCache | None = None,
        *,
        output_indices: Int[Tensor, " outputs"] | None = None,
        recompute: bool = False,
        measure: bool = False,
        routes: Sequence[Int[Tensor, "tokens choice"]] | None = None,
    ) -> BackboneOutput:
        """Run all blocks on embedded tokens.

        With a `state` the call continues the sequences in its slots. With `output_indices` the
        result has only these tokens (for a prompt, the last one), and the layers after the last one
        with a state compute only these. `recompute` trades time for memory: only the inputs of
        blocks are stored for the backward pass. `measure` records the root mean square of the
        residual stream after each block. `routes` are the experts of all tokens of the call, for
        each MoE layer; without them the routers choose.
        """
        assert state is None or not recompute, "a recomputed pass would advance the state twice"
        if state is not None:
            state.check(layout)
        recorded = iter(routes or ())
        rows: Tensor | None = None  # `output_indices`, in the layers that compute only these
        routings: list[Routing] = []
        residual_rms: list[Tensor] = []
        for index, layer in enumerate(self.layers):
            layer_state = None if state is None else state.layers[index]
            chosen = next(recorded, None) if layer.has_router else None
            if chosen is not None and rows is not None:
                chosen = chosen[rows]
            if recompute:
                x, routing = checkpoint(
                    layer,
                    x,
                    layout,
                    layer_state,
                    chosen,
                    use_reentrant=False,
                    preserve_rng_state=False,
                )
            else:
                x, routing = layer(x, layout, layer_state, chosen)
            if routing is not None:
                routings.append(routing)
            if measure:
                residual_rms.append(x.detach().float().square().mean().sqrt())
            if output_indices is not None and index == self.last_stateful_layer:
                x, rows = F.embedding(output_indices, x), output_indices
        if state is not None:
            state.advance(layout)
        return BackboneOutput(self.norm_f(x), routings, residual_rms)


class LanguageModel(nn.Module):
    """A hybrid Mamba-2 / attention / mixture-of-experts language model."""

    def __init__(self, config: ModelConfig) -> None:
        """Modules with uninitialised parameters; use `from_config` or `from_pretrained`."""
        super().__init__()
        self.config = config
        self.activation_dtype: torch.dtype | None = None
        """The dtype of activations and products; None for that of the parameters."""
        self.rounding_position = RoundingPosition()
        """Step and microbatch of training, on which the noise of stochastic rounding depends."""
        self.companions: huggingface.Companions | None = None
        """The files besides the tensors in the directory of the loaded model."""
        self.mapped_bytes = 0
        """Bytes of weights that are pages of mapped files, which the system may count as free."""
        self.backbone = Backbone(config)
        self.lm_head = (
            None if config.tie_word_embeddings else Linear(config.hidden_size, config.vocab_size)
        )
        self.mtp = MultiTokenPredictor(config) if config.pattern.mtp else None

    @classmethod
    def from_config(
        cls,
        config: ModelConfig,
        *,
        seed: int = 0,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> "LanguageModel":
        """A new model with initial weights computed from `seed`, the same on every device.

        Parameters have `dtype`, except those of the scan and the router's bias: they are float32.
        """
        with torch.device("meta"):
            model = cls(config)
        allocate(model, torch.device(device), dtype)
        initialize(model, config, seed)
        return model

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype | None = None,
        cast_dtype: torch.dtype | None = None,
        weights: WeightFormat | Mapping[str, WeightFormat] | None = None,
        config_class: type[ModelConfig] = ModelConfig,
        mapped: bool = False,
    ) -> "LanguageModel":
        """A model from a directory in the published layout (config.json and safetensors).

        Weights are read onto `device` shard by shard, in `dtype`, by default in the stored dtype;
        the scan's parameters and the router's bias are float32. `cast_dtype` is another dtype for
        the matrices of products and the embedding, which are cast to the dtype of activations where
        they are used: in that one they compute the same. `weights` is the number format of
        the matrices of dense layers, experts and output layer, or formats by the names of
        parameters; plain ones are quantized as they are read. Matrices that are stored quantized,
        in ModelOpt's published form or in ours, are read as they are. `config_class` is the
        subclass of ModelConfig that the model was saved with, if it has one.

        With `mapped` the matrices of products and the embedding are not copied: they are the pages
        of the files, in the stored dtypes, and activations and all else are float32. It is for
        inference on the CPU, and no parameter requires gradients. A write into a mapped matrix
        copies its pages in this process; the file stays as it is.
        """
        if mapped and (torch.device(device).type != "cpu" or dtype or cast_dtype):
            raise ConfigError(
                f"is set with device {device} and dtype {dtype or cast_dtype}; mapped weights are "
                "on the CPU and keep the stored dtypes",
                field="mapped",
            )
        companions = huggingface.read_directory(path, config_class)
        config = companions.config
        with torch.device("meta"):
            model = cls(config)
            quantization = huggingface.use_stored_formats(model, path, weights)
        if mapped:
            model.mapped_bytes = huggingface.map_weights(model, config, path)
            model.requires_grad_(False).activation_dtype = torch.float32
        else:
            huggingface.read_weights(
                model, config, path, device=torch.device(device), dtype=dtype, cast_dtype=cast_dtype
            )
        model.companions = replace(companions, quantization=quantization)
        return model

    def save_pretrained(self, path: str | Path, *, max_shard_bytes: int = 5_000_000_000) -> None:
        """Write the published directory layout, which Hugging Face and other engines read.

        For a model that was loaded, the other contents of its directory are written as well: fields
        of config.json and generation_config.json that this package does not read, the tokenizer and
        the chat template. Quantized weights are written as codes and scales: NVFP4 and FP8 in
        ModelOpt's published form, int8 in this package's own layout. To write plain tensors convert
        the model first (`models.precision.convert_weights`).
        A model with an adapter is merged first (`models.lora.shared_model`, or of quantized weights
        `dequantized_with`).
        """
        if any(isinstance(module, ComputedWeight) for module in self.modules()):
            raise ConfigError(
                "the model has an adapter beside its weights, which a model directory cannot hold; "
                "save shared_model(model), or the adapter by write_adapter; of quantized weights, "
                "dequantized_with(shared_model(model, {}), adapter_of(model))"
            )
        huggingface.write_model(
            self,
            self.config,
            path,
            max_shard_bytes=max_shard_bytes,
            companions=self.companions,
        )

    @property
    def output_weight(self) -> Weight:
        """The output layer's matrix [vocab, d_model]."""
        if self.lm_head is None:
            return self.backbone.embeddings.weight
        weight = self.lm_head.weight
        return weight.value() if isinstance(weight, ComputedWeight) else weight

    @property
    def routers(self) -> list[Router]:
        """All routers: those of the backbone, first to last, then those of the MTP block."""
        return [module for module in self.modules() if isinstance(module, Router)]

    @property
    def compute_dtype(self) -> torch.dtype:
        """The dtype of activations and products."""
        return self.activation_dtype or self.backbone.embeddings.weight.dtype

    @property
    def device(self) -> torch.device:
        """The device of the parameters."""
        return self.backbone.embeddings.weight.device

    def embed(self, tokens: Int[Tensor, " tokens"]) -> Float[Tensor, "tokens d_model"]:
        """Embeddings, in the dtype of activations."""
        x = self.backbone.embeddings(tokens)
        return x if self.activation_dtype is None else x.to(self.activation_dtype)

    def hidden_states(
        self,
        tokens: Int[Tensor, " tokens"],
        *,
        layout: SequenceLayout,
        state: HybridCache | None = None,
        output_indices: Int[Tensor, " outputs"] | None = None,
    ) -> Float[Tensor, "tokens d_model"]:
        """The residual stream after the final norm, of all tokens or of those at
        `output_indices`."""
        return self.backbone(
            self.embed(tokens), layout, state, output_indices=output_indices
        ).hidden

    def logits(self, hidden: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch vocab"]:
        """Logits of hidden states, in float32 at least."""
        matrix = self.backbone.embeddings if self.lm_head is None else self.lm_head
        logits = dense(hidden, matrix.weight)
        return logits.to(torch.promote_types(logits.dtype, torch.float32))

    @overload
    def forward(
        self,
        tokens: Int[Tensor, "*batch seq"],
        *,
        layout: SequenceLayout | None = None,
        state: HybridCache | None = None,
        routes: RecordedRoutes | None = None,
    ) -> Float[Tensor, "*batch seq vocab"]: ...

    @overload
    def forward(
        self,
        tokens: Int[Tensor, "*batch seq"],
        *,
        head: Head[T],
        layout: SequenceLayout | None = None,
        state: HybridCache | None = None,
        routes: RecordedRoutes | None = None,
        mtp_depths: int = 0,
        detach_mtp: bool = False,
        recompute: bool = False,
        measure: bool = False,
    ) -> T: ...

    def forward(  # noqa: PLR0913 - what a pass computes, and how
        self,
        tokens: Int[Tensor, "*batch seq"],
        *,
        layout: SequenceLayout | None = None,
        state: HybridCache | None = None,
        routes: RecordedRoutes | None = None,
        head: Head[T] | None = None,
        mtp_depths: int = 0,
        detach_mtp: bool = False,
        recompute: bool = False,
        measure: bool = False,
    ) -> Tensor | T:
        """Logits for each token of a [batch, seq] tensor, or of a packed stream with its layout.

        With a `head` no logits are computed: the head is called with the hidden states (also those
        of `mtp_depths` depths), and its result is returned. It runs inside the forward pass, where
        a sharded module has its full parameters. Tensors of its result that require gradients must
        be in tuples, lists or dicts, so that hooks find them. `recompute` and `measure` are as in
        `Backbone.forward`. With `detach_mtp` the depths have no gradients of backbone and
        embedding, so training them does not change the main head.

        With `routes` the backbone, and the depths if `routes` has theirs, use experts that another
        pass chose; their weights are computed from the scores of this pass.

        Raises ConfigError for tokens, a layout or routes that do not fit.
        """
        layout = self._checked_layout(tokens, layout, state)
        stream = tokens.flatten()
        if routes is not None:
            routes.check(self.config, tokens=len(stream), mtp_depths=mtp_depths)
        backbone = self.backbone(
            self.embed(stream),
            layout,
            state,
            recompute=recompute,
            measure=measure,
            routes=None if routes is None else routes.backbone,
        )
        if head is None:
            return self.logits(backbone.hidden).unflatten(0, tokens.shape)
        hidden, mtp_routings = [backbone.hidden], []
        if mtp_depths:
            if self.mtp is None or state is not None:
                raise ConfigError(
                    f"mtp_depths is {mtp_depths}; a model without an MTP block has no depths, and "
                    "a call with a state computes only the main head: set it to 0"
                )
            if layout.prefixes:
                raise ConfigError(
                    f"mtp_depths is {mtp_depths} and the layout has prefixes, whose last tokens "
                    "have no single next one; give every sequence whole"
                )
            inputs = [self.embed(_ahead(stream, layout, n)) for n in range(1, mtp_depths + 1)]
            further, mtp_routings = self.mtp.unroll(
                [embedded.detach() for embedded in inputs] if detach_mtp else inputs,
                backbone.hidden.detach() if detach_mtp else backbone.hidden,
                layout,
                routes=None if routes is None else routes.mtp,
                recompute=recompute,
            )
            hidden += further
        return head(
            ModelOutput(
                hidden, self.output_weight, backbone.routings, mtp_routings, backbone.residual_rms
            )
        )

    def _checked_layout(
        self, tokens: Tensor, layout: SequenceLayout | None, state: HybridCache | None
    ) -> SequenceLayout:
        if layout is None:
            if tokens.dim() != 2:
                raise ConfigError(
                    f"tokens have shape {tuple(tokens.shape)}; without a layout they must be "
                    "[batch, seq], and a packed stream needs layout=SequenceLayout.packed(lengths)"
                )
            batch, length = tokens.shape
            layout = SequenceLayout.of(tokens) if state is None else state.layout([length] * batch)
        if layout.segments.total != tokens.numel():
            raise ConfigError(
                f"the layout describes {layout.segments.total} tokens, "
                f"but {tokens.numel()} were given"
            )
        if state is None and any(layout.cached_lengths):
            raise ConfigError(
                f"the layout continues sequences of {layout.cached_lengths} tokens; "
                "give the state too"
            )
        if layout.prefixes and not self.config.continues_prefixes:
            raise ConfigError(
                "the layout has prefixes, which a mixer of this model does not heed "
                "(MixerConfig.continues_prefixes); give every sequence whole"
            )
        return layout

    def next_logits(
        self, tokens: Int[Tensor, " tokens"], *, layout: SequenceLayout, state: HybridCache
    ) -> Float[Tensor, "sequences vocab"]:
        """Logits after the last token of each sequence; no others are computed."""
        is_long = len(tokens) > len(layout.segments)
        last = layout.segments.last_indices(tokens.device) if is_long else None
        return self.logits(
            self.hidden_states(tokens, layout=layout, state=state, output_indices=last)
        )

    def new_state(self, slots: int, precision: StatePrecision | None = None) -> HybridCache:
        """An empty state for `slots` sequences."""
        return HybridCache(
            self.config,
            slots=slots,
            dtype=self.compute_dtype,
            device=self.device,
            precision=self.state_precision(precision),
        )

    def state_precision(self, precision: StatePrecision | None) -> StatePrecision | None:
        """Number formats of a state, with the scales of keys and values in the model's directory.

        They apply to float8, and where `precision` has no others.
        """
        if precision is None or precision.keys != "float8" or precision.key_scales:
            return precision
        scales = huggingface.stored_key_scales(self, self.companions)
        return replace(precision, key_scales=scales)


def _ahead(tokens: Tensor, layout: SequenceLayout, by: int) -> Tensor:
    """The token `by` positions after each token in its sequence; 0 after its end."""
    return shift_left(tokens, layout.segments, by)[0]
