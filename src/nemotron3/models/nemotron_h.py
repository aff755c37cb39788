"""The language model: embedding, a stack of blocks, a final norm, an output layer, and MTP.

The same forward pass trains, evaluates and generates; only the layout of the batch differs, and
whether a state is carried.

    model = LanguageModel.from_config(ModelConfig.preset("tiny"), seed=0)
    model(tokens)                                             # [batch, seq] -> [batch, seq, vocab]
    model(stream, layout=SequenceLayout.packed([5, 3]))       # [8] -> [8, vocab], two documents
    model(stream, layout=layout, head=loss, mtp_depths=2)     # loss(ModelOutput), without logits
"""

from collections.abc import Callable, Sequence
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
from nemotron3.models.parameter import use_weight_format
from nemotron3.models.routes import RecordedRoutes
from nemotron3.ops.products import dense
from nemotron3.ops.weights import Weight, WeightFormat

T = TypeVar("T")


class BackboneOutput(NamedTuple):
    """What the stack of blocks yields."""

    hidden: Float[Tensor, "tokens d_model"]
    """The residual stream after the final norm."""
    routings: list[Routing]
    """Decisions of the routers, first mixture to last."""
    residual_rms: list[Tensor]
    """Root mean square of the residual stream after each block, where it was asked for."""


class ModelOutput(NamedTuple):
    """What a forward pass hands to its head: hidden states, and the matrix that makes logits."""

    hidden: list[Float[Tensor, "tokens d_model"]]
    """After the final norm, of the main head and then of each MTP depth that was asked for."""
    output_weight: Weight
    """The output layer's matrix [vocab, d_model], whole; all depths share it."""
    routings: list[Routing]
    """Decisions of the backbone's routers, first mixture to last."""
    mtp_routings: list[list[Routing]]
    """Decisions of the MTP block's routers, for each depth."""
    residual_rms: list[Tensor]
    """Root mean square of the residual stream after each block, where it was asked for."""

    @property
    def routes(self) -> RecordedRoutes:
        """The chosen experts, for a pass that replays them."""
        return RecordedRoutes(
            backbone=[routing.indices for routing in self.routings],
            mtp=[[routing.indices for routing in depth] for depth in self.mtp_routings] or None,
        )


Head = Callable[[ModelOutput], T]
"""What makes the result of a forward pass."""


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

        With a `state` the call continues what its slots hold. Where only some tokens' outputs are
        `output_indices`, the result is theirs, and they alone pass the layers behind the last one
        that has a state: of a prompt it is a single one. `recompute` trades time for memory: only
        the inputs of blocks are kept for the backward pass. `measure` records the size of the
        residual stream after each block. `routes` are the experts of all tokens of the call, for
        each mixture; without them the routers choose.
        """
        assert state is None or not recompute, "a recomputed pass would advance the state twice"
        if state is not None:
            state.check(layout)
        recorded = iter(routes or ())
        rows: Tensor | None = None  # those of the wanted tokens, once they alone go on
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
        """What products run in; None for the dtype of the parameters."""
        self.companions: huggingface.Companions | None = None
        """What the directory that the model was loaded from says beside its tensors."""
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
        """A new model with initial weights drawn from `seed`, the same on every device.

        Parameters are kept in `dtype`; the scan's own and the router's bias always in float32.
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
        weights: WeightFormat | None = None,
        config_class: type[ModelConfig] = ModelConfig,
    ) -> "LanguageModel":
        """A model from a directory in the published layout (config.json and safetensors).

        Weights stream onto `device` shard by shard, in `dtype` where it is given and as they are
        stored where not; the scan's own parameters and the router's bias stay float32. With
        `weights` the matrices of dense layers, experts and output layer are kept in that number
        format, each quantized as it is read; without, in the one they are stored in.
        `config_class` is the subclass of ModelConfig that the model was saved with, if it has one.
        """
        companions = huggingface.read_directory(path, config_class)
        config = companions.config
        with torch.device("meta"):
            model = cls(config)
            if (held := weights or huggingface.stored_weight_format(path)) is not None:
                use_weight_format(model, held)
        huggingface.read_weights(model, config, path, device=torch.device(device), dtype=dtype)
        model.companions = companions
        return model

    def save_pretrained(self, path: str | Path, *, max_shard_bytes: int = 5_000_000_000) -> None:
        """Write the published directory layout, which Hugging Face and other engines read.

        A model that was loaded gets back what its directory held beside the tensors: fields of
        config.json and generation_config.json that nothing here reads, tokenizer and chat template.
        Quantized weights are written as they are, codes and scales, in this package's own layout;
        for a published one convert the model first (`models.precision.convert_weights`).
        """
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
        return self.backbone.embeddings.weight if self.lm_head is None else self.lm_head.weight

    @property
    def routers(self) -> list[Router]:
        """Every router, the backbone's first to last and then those of the MTP block."""
        return [module for module in self.modules() if isinstance(module, Router)]

    @property
    def compute_dtype(self) -> torch.dtype:
        """What activations have and products run in."""
        return self.activation_dtype or self.backbone.embeddings.weight.dtype

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return self.output_weight.device

    def embed(self, tokens: Int[Tensor, " tokens"]) -> Float[Tensor, "tokens d_model"]:
        """Embeddings, in the dtype that activations have."""
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
        logits = dense(hidden, self.output_weight)
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
        recompute: bool = False,
        measure: bool = False,
    ) -> T: ...

    def forward(
        self,
        tokens: Int[Tensor, "*batch seq"],
        *,
        layout: SequenceLayout | None = None,
        state: HybridCache | None = None,
        routes: RecordedRoutes | None = None,
        head: Head[T] | None = None,
        mtp_depths: int = 0,
        recompute: bool = False,
        measure: bool = False,
    ) -> Tensor | T:
        """Logits for each token, of a [batch, seq] tensor or of a packed stream with its layout.

        With a `head` the result is what it makes of the hidden states, and no logits are made. It
        runs inside the pass, where a module that is sharded over processes has its whole
        parameters; tensors that gradients flow through belong into tuples, lists or dicts of its
        result, so that hooks find them. It is given the hidden states of `mtp_depths` depths too.
        `recompute` and `measure` are as in `Backbone.forward`.

        With `routes` the experts of the backbone, and of the depths if it has theirs, are those
        that another pass chose; their weights are computed from the scores of this one.
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
                    f"mtp_depths is {mtp_depths}; a model without an MTP block has none, and a "
                    "call with a state reads the main head only: set it to 0"
                )
            further, mtp_routings = self.mtp.unroll(
                [self.embed(_ahead(stream, layout, depth)) for depth in range(1, mtp_depths + 1)],
                backbone.hidden,
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
        return layout

    def next_logits(
        self, tokens: Int[Tensor, " tokens"], *, layout: SequenceLayout, state: HybridCache
    ) -> Float[Tensor, "sequences vocab"]:
        """Logits after the last token of each sequence: of a long prompt no others are made."""
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
            precision=precision,
        )


def _ahead(tokens: Tensor, layout: SequenceLayout, by: int) -> Tensor:
    """The token `by` places later in each token's sequence, 0 where it has ended."""
    return shift_left(tokens, layout.segments, by)[0]
