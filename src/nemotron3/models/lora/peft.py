"""Adapter directories in PEFT's layout: adapter_config.json and adapter_model.safetensors.

Names are those of the published model behind `base_model.model.`, such as
`base_model.model.backbone.layers.0.mixer.in_proj.lora_A.weight`; `model.layers...`, the spelling of
transformers 5, is read as well. PEFT adapts stacked experts as `target_parameters`: a wrapper for
each of the two matrices, the second around the first. So the first one's tensors are named
`experts.base_layer.lora_A.weight` and the second one's `experts.lora_A.weight`. With E experts, A
is [E rank, in], expert after expert, and B [out, rank E], the expert as the inner index. An
adapter by experts (`experts.3.up_proj.lora_A.weight`), as other programs write it, is read too.
"""

import math
import os
import re
from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from nemotron3.checkpoint.files import full_disk_named, tensor_file, write_file
from nemotron3.errors import CheckpointError
from nemotron3.models import huggingface
from nemotron3.models.adapted_weight import AdaptedWeight, LowRank
from nemotron3.models.huggingface.companions import (
    Companions,
    read_companions,
    read_json,
    write_json,
)
from nemotron3.models.lora.adapter import Adapter, adapter_of, products
from nemotron3.models.lora.config import LoRAConfig
from nemotron3.models.nemotron_h import LanguageModel
from nemotron3.ops.weights import Weight

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
_PREFIX = "base_model.model."
_TENSOR = re.compile(r"(.+)\.lora_([AB])(?:\.default)?\.weight")
_EXPERT = re.compile(r"(.*\.experts)\.(\d+)\.(\w+)")
_BASE_LAYER = ".base_layer.weight"
_INNER, _OUTER = "up_proj", "down_proj"
_LARGEST_ROUNDING = 0.25
"""Of a matrix in a number format, relative to its norm; that of another matrix is above 1."""
_CHANGES_THE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""Beginnings of `init_lora_weights` that write into the base model's weights as well."""


def write_adapter(
    directory: Path | str, model: LanguageModel, config: LoRAConfig, *, base: str
) -> None:
    """Write the adapter of a model; `base` is what adapter_config.json calls the base model."""
    directory, adapter = Path(directory), adapter_of(model)
    name_of = _published_names(model)
    tensors: dict[str, Tensor] = {}
    for name, change in adapter.items():
        stem = _PREFIX + _module_of(name, name_of, adapter)
        tensors[f"{stem}.lora_A.weight"] = change.A.flatten(0, -2)
        B = change.B if change.B.dim() == 2 else change.B.permute(1, 2, 0).flatten(1)
        tensors[f"{stem}.lora_B.weight"] = B
    fields = _config_fields(model, config, adapter, name_of, base)
    with full_disk_named(directory, sum(tensor.nbytes for tensor in tensors.values())):
        directory.mkdir(parents=True, exist_ok=True)
        partial = directory / f"{WEIGHTS_FILE}.tmp"
        write_file(partial, tensor_file(tensors))
        os.replace(partial, directory / WEIGHTS_FILE)
    write_json(directory / CONFIG_FILE, fields)


def read_adapter(directory: Path | str, model: LanguageModel) -> dict[str, LowRank]:
    """The adapter in a directory, compared with the model that it is for.

    Raises CheckpointError for a tensor that does not fit the model, and for an adapter that is more
    than low-rank changes of products.
    """
    files = _AdapterFiles(Path(directory), model)
    adapter = files.adapter()
    if not adapter:
        raise CheckpointError(f"{files.weights} holds no tensor; it changes nothing")
    return adapter


def companions_with_adapter(companions: Companions, directory: Path | str) -> Companions:
    """A model's files, with the tokenizer, template and defaults of sampling of an adapter.

    An adapter's directory has them where it was trained with others than the base model's.
    """
    found = read_companions(Path(directory), config=companions.config, fields=companions.fields)
    return replace(
        companions,
        generation_config=found.generation_config or companions.generation_config,
        tokenizer_files={**companions.tokenizer_files, **found.tokenizer_files},
    )


def _dialect(model: LanguageModel) -> ModuleType:
    return huggingface.dialect_of(model, model.config, model.companions)


def _published_names(model: LanguageModel) -> dict[str, str]:
    """The published name of each product, by ours."""
    dialect = _dialect(model)
    return {name: dialect.published_product(name) for name in products(model)}


def _module_of(name: str, name_of: Mapping[str, str], adapter: Adapter) -> str:
    """The module of PEFT's model that holds a product's change."""
    if adapter[name].A.dim() == 2:
        return name_of[name]
    owner, _, part = name.rpartition(".")
    stem = name_of[name].rpartition(".")[0]
    is_inner = part == _INNER and f"{owner}.{_OUTER}" in adapter
    return f"{stem}.base_layer" if is_inner else stem


def _config_fields(
    model: LanguageModel,
    config: LoRAConfig,
    adapter: Adapter,
    name_of: Mapping[str, str],
    base: str,
) -> dict[str, Any]:
    stacked = {name for name, change in adapter.items() if change.A.dim() == 3}
    is_stacked = {name: len(product.shape) == 3 for name, product in products(model).items()}
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "inference_mode": True,
        "r": config.rank,
        "lora_alpha": int(config.alpha) if config.alpha.is_integer() else config.alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "use_dora": False,
        "use_rslora": False,
        "modules_to_save": None,
        "rank_pattern": {},
        "alpha_pattern": {},
        "target_modules": _shortest_ends(
            [name_of[name] for name in adapter if name not in stacked],
            [name_of[name] for name in name_of if not is_stacked[name]],
        ),
        "target_parameters": _shortest_ends(
            [name_of[name] for name in adapter if name in stacked],
            [name_of[name] for name in name_of if is_stacked[name]],
            least=2,  # `experts.up_proj`: a shared expert has an `up_proj` too
        )
        or None,
    }


def _shortest_ends(chosen: list[str], all_names: list[str], *, least: int = 1) -> list[str]:
    """Ends of names that `chosen` have and no others, such as `in_proj`: PEFT matches by them.

    `least` is how many of a name's words an end has at least; it begins with no number.
    """
    others = [f".{name}" for name in all_names if name not in set(chosen)]
    ends: dict[str, None] = {}
    for name in chosen:
        words = name.split(".")
        starts = [at for at in range(len(words) - least + 1) if not words[at].isdecimal()]
        tails = (".".join(words[at:]) for at in reversed(starts))
        end = next(t for t in tails if not any(other.endswith(f".{t}") for other in others))
        ends[end] = None
    return list(ends)


def _is_same(stored: Tensor, weight: Weight) -> bool:
    """Whether a plain matrix is the model's, up to the rounding of a number format."""
    if isinstance(weight, Tensor):
        return torch.equal(stored.to(weight), weight)
    if stored.shape != weight.shape:
        return False
    plain = stored.to(weight.device, torch.float32)
    off = (weight.dequantize() - plain).norm()
    return bool(off <= _LARGEST_ROUNDING * plain.norm())


class _Part(NamedTuple):
    """Where a tensor of the file belongs."""

    product: str
    matrix: str
    """A or B."""
    expert: int | None
    """The expert of an adapter that has tensors for each; None for a whole product."""


class _AdapterFiles:
    """An adapter's directory, read for one model."""

    def __init__(self, directory: Path, model: LanguageModel) -> None:
        self.directory, self.weights = directory, directory / WEIGHTS_FILE
        self.file = directory / CONFIG_FILE
        if not self.file.is_file():
            raise CheckpointError(
                f"{directory} holds no {CONFIG_FILE}; name the directory of an adapter, such as "
                "runs/NAME/adapter"
            )
        self.fields = read_json(self.file)
        self.model = model
        self.dialect = _dialect(model)
        self.products = products(model)
        self.by_published = {name: ours for ours, name in _published_names(model).items()}
        self._check_config()

    def adapter(self) -> dict[str, LowRank]:
        """All changes."""
        tensors = self._tensors()
        found: dict[str, dict[tuple[str, int | None], str]] = {}
        for name, tensor in tensors.items():
            if name.endswith(_BASE_LAYER):
                self._check_base(name, tensor)
                continue
            part = self._part(name, tensors.keys())
            key = part.matrix, part.expert
            if (other := found.setdefault(part.product, {}).setdefault(key, name)) != name:
                raise CheckpointError(
                    f"{self.weights}: {other!r} and {name!r} are both {part.matrix} of "
                    f"{part.product}"
                )
        return {name: self._change(name, found[name], tensors) for name in sorted(found)}

    def _check_config(self) -> None:
        unlike = {
            "peft_type": "LORA",
            "bias": "none",
            "fan_in_fan_out": False,
            "use_dora": False,
            "lora_bias": False,
        }
        for name, wanted in unlike.items():
            if self.fields.get(name) not in (wanted, None):
                raise CheckpointError(
                    f"{self.file}: {name} is {self.fields[name]!r}; only adapters with {wanted!r} "
                    "are read"
                )
        for name in ("modules_to_save", "trainable_token_indices", "layer_replication"):
            if self.fields.get(name):
                raise CheckpointError(
                    f"{self.file}: {name} is {self.fields[name]!r}; only low-rank changes of "
                    "products are read, so train an adapter without it"
                )
        begun = self.fields.get("init_lora_weights")
        if isinstance(begun, str) and begun.lower().startswith(_CHANGES_THE_BASE):
            raise CheckpointError(
                f"{self.file}: init_lora_weights is {begun!r}, whose base model has other weights "
                "than the published one; convert the adapter (PEFT's save_pretrained with "
                "path_initial_model_for_weight_conversion)"
            )
        for name in ("r", "lora_alpha"):
            value = self.fields.get(name)
            if isinstance(value, bool) or not isinstance(value, int | float) or value <= 0:
                raise CheckpointError(f"{self.file}: {name} is {value!r}; it must be positive")

    def _tensors(self) -> dict[str, Tensor]:
        if not self.weights.is_file():
            raise CheckpointError(
                f"{self.directory} holds no {WEIGHTS_FILE}; the download is incomplete, or the "
                "adapter was saved as another format: save it as safetensors"
            )
        try:
            with safe_open(self.weights, framework="pt") as file:
                return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise CheckpointError(
                f"{self.weights} cannot be read as safetensors ({error}); fetch or save it again"
            ) from error

    def _check_base(self, name: str, tensor: Tensor) -> None:
        """PEFT saves the weight of an adapted output layer too; it must be the model's."""
        module = self.dialect.our_spelling(name.removeprefix(_PREFIX).removesuffix(_BASE_LAYER))
        ours = self.by_published.get(module)
        weight = None if ours is None else self.products[ours].weight
        weight = weight.base if isinstance(weight, AdaptedWeight) else weight
        if weight is None or not _is_same(tensor, weight):
            raise CheckpointError(
                f"{self.weights}: {name!r} is not the weight of this model; the adapter is of "
                "another model"
            )

    def _part(self, name: str, names: Collection[str]) -> _Part:
        match = _TENSOR.fullmatch(name.removeprefix(_PREFIX))
        if match is None:
            raise CheckpointError(
                f"{self.weights}: {name!r} is no low-rank change of a product; only tensors named "
                "...lora_A.weight and ...lora_B.weight are read"
            )
        module, matrix = self.dialect.our_spelling(match[1]), match[2]
        if (ours := self.by_published.get(module)) is not None:
            return _Part(ours, matrix, None)
        if (expert := _EXPERT.fullmatch(module)) is not None:
            ours = self.by_published.get(f"{expert[1]}.{expert[3]}")
            if ours is not None:
                return _Part(ours, matrix, int(expert[2]))
        if (ours := self._stacked(name, module, names)) is not None:
            return _Part(ours, matrix, None)
        raise CheckpointError(
            f"{self.weights}: {name!r} changes {module!r}, which is no product of this model; the "
            "adapter is of another model"
        )

    def _stacked(self, name: str, module: str, names: Collection[str]) -> str | None:
        """The product that a wrapper of PEFT around stacked experts changes."""
        owner = module.removesuffix(".base_layer")
        ours = [
            product
            for published, product in self.by_published.items()
            if published.rpartition(".")[0] == owner and len(self._shape(product)) == 3
        ]
        inner = next((product for product in ours if product.endswith(_INNER)), None)
        outer = next((product for product in ours if product.endswith(_OUTER)), None)
        if inner is None or outer is None:
            return None
        if owner != module:
            return inner
        has_inner = name.replace(".lora_", ".base_layer.lora_") in names
        return outer if has_inner or self._is_target(outer) else inner

    def _is_target(self, product: str) -> bool:
        """Whether a stacked product is among the targets of the adapter's configuration."""
        published = self.dialect.published_product(product)
        spelled = (published, published.replace("backbone.", "model.", 1))
        targets = self.fields.get("target_parameters") or ()
        return any(
            name == target or name.endswith(f".{target}") for name in spelled for target in targets
        )

    def _shape(self, product: str) -> torch.Size:
        return self.products[product].shape

    def _change(
        self, product: str, parts: Mapping[tuple[str, int | None], str], tensors: dict[str, Tensor]
    ) -> LowRank:
        shape = self._shape(product)
        if any(expert is not None for _, expert in parts):
            needed = [(matrix, expert) for expert in range(shape[0]) for matrix in "AB"]
        else:
            needed = [("A", None), ("B", None)]
        if missing := [key for key in needed if key not in parts]:
            matrix, expert = missing[0]
            of = "" if expert is None else f" of expert {expert}"
            raise CheckpointError(
                f"{self.weights} lacks lora_{matrix}{of} of {product}; the file is incomplete"
            )
        if surplus := [key for key in parts if key not in needed]:
            raise CheckpointError(
                f"{self.weights}: {parts[surplus[0]]!r} is of an expert that the model does not "
                f"have; {product} has {shape[0]}"
            )
        rank, scale = self._rank_and_scale(product)
        d_out, d_in = shape[-2:]
        experts = shape[0] if len(shape) == 3 and needed[0][1] is None else 1
        sizes = {"A": (experts * rank, d_in), "B": (d_out, experts * rank)}
        for key in needed:
            tensor, wanted = tensors[parts[key]], sizes[key[0]]
            if tuple(tensor.shape) != wanted:
                raise CheckpointError(
                    f"{self.weights}: {parts[key]!r} has shape {tuple(tensor.shape)}, and rank "
                    f"{rank} of {product}, which is {tuple(shape)}, calls for {wanted}; the "
                    "adapter is of another model"
                )
            if not tensor.is_floating_point() or not tensor.isfinite().all():
                raise CheckpointError(
                    f"{self.weights}: {parts[key]!r} holds values that are not finite numbers"
                )
        A, B = ([tensors[parts[key]].float() for key in needed if key[0] == m] for m in "AB")
        device = self.products[product].weight.device
        if len(shape) == 2:
            return LowRank(A[0].to(device), B[0].to(device), scale)
        if len(A) > 1 or needed[0][1] is not None:
            return LowRank(torch.stack(A).to(device), torch.stack(B).to(device), scale)
        stacked = B[0].unflatten(1, (rank, experts)).permute(2, 0, 1).contiguous()
        return LowRank(A[0].unflatten(0, (experts, rank)).to(device), stacked.to(device), scale)

    def _rank_and_scale(self, product: str) -> tuple[int, float]:
        published = self.dialect.published_product(product)
        rank = int(self._of_pattern("rank_pattern", published, self.fields["r"]))
        alpha = float(self._of_pattern("alpha_pattern", published, self.fields["lora_alpha"]))
        return rank, alpha / (math.sqrt(rank) if self.fields.get("use_rslora") else rank)

    def _of_pattern(self, name: str, published: str, default: Any) -> Any:
        """PEFT's exceptions by module: the first key that fits the end of its name."""
        spelled = (published, published.replace("backbone.", "model.", 1))
        for key, value in (self.fields.get(name) or {}).items():
            if any(re.fullmatch(rf"(.*\.)?({key})", module) for module in spelled):
                return value
        return default
