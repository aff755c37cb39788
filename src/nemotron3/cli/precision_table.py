"""`nemotron3 info MODEL --precision`: which products of a model run in which number format."""

from typing import Any

import torch

from nemotron3.models.config import ModelConfig
from nemotron3.models.nemotron_h import LanguageModel
from nemotron3.models.precision import PrecisionConfig, ProductPrecision, product_precisions


def precision_record(config: ModelConfig, recipe: str) -> list[dict[str, Any]]:
    """A row for each kind of product and format: its layers, parameters, and where it is."""
    precision = PrecisionConfig(recipe="nvfp4" if recipe == "nvfp4" else "plain")
    with torch.device("meta"):
        model = LanguageModel(config)
    rows: dict[tuple[str, str, str], list[ProductPrecision]] = {}
    for product in product_precisions(model, precision):
        rows.setdefault((product.part, product.kind, product.format), []).append(product)
    return [
        {
            "part": part,
            "product": kind,
            "format": found,
            "layers": sorted({product.layer for product in of}) if part == "backbone" else None,
            "parameters": sum(product.parameters for product in of),
        }
        for (part, kind, found), of in rows.items()
    ]


def precision_page(name: str, config: ModelConfig, recipe: str) -> str:
    """The same as a table, with the share of parameters in each format."""
    rows = precision_record(config, recipe)
    total = sum(row["parameters"] for row in rows)
    widest = max(len(_label(row)) for row in rows)
    lines = [
        f"{name}: {config.num_layers} layers, training.precision.recipe {recipe}",
        f"  {config.hybrid_override_pattern}",
        "",
        f"{'product':<{widest}}  {'format':<12}{'parameters':>18}  layers",
    ]
    lines += [
        f"{_label(row):<{widest}}  {row['format']:<12}{row['parameters']:>18,}"
        f"  {_ranges(row['layers'])}"
        for row in rows
    ]
    shares: dict[str, int] = {}
    for row in rows:
        shares[row["format"]] = shares.get(row["format"], 0) + row["parameters"]
    found = ", ".join(f"{count / total:.1%} {kind}" for kind, count in shares.items())
    lines += ["", f"weights of products: {found}"]
    lines += ["`activations` is the dtype of training.precision.activations"]
    return "\n".join(line.rstrip() for line in lines)


def _label(row: dict[str, Any]) -> str:
    return row["product"] if row["part"] == "backbone" else f"{row['part']} {row['product']}"


def _ranges(layers: list[int] | None) -> str:
    """Layers as `0-4, 7`; long lists are cut to their number and ends."""
    if layers is None:
        return ""
    if len(layers) > 6:
        return f"{len(layers)} of layers {layers[0]} to {layers[-1]}"
    return ", ".join(map(str, layers))
