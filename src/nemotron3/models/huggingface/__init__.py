"""Model directories in published layouts: the only package with other names than ours."""

from nemotron3.models.huggingface.companions import Companions
from nemotron3.models.huggingface.directory import (
    dialect_of,
    is_published_layout,
    map_weights,
    prepared_weights,
    published_views,
    read_config,
    read_directory,
    read_weights,
    stored_values,
    write_model,
    write_weights,
)
from nemotron3.models.huggingface.modelopt import StoredQuantization
from nemotron3.models.huggingface.stored_formats import (
    published_weights,
    stored_key_scales,
    stored_weight_format,
    use_stored_formats,
)

__all__ = [
    "Companions",
    "StoredQuantization",
    "dialect_of",
    "is_published_layout",
    "map_weights",
    "prepared_weights",
    "published_views",
    "published_weights",
    "read_config",
    "read_directory",
    "read_weights",
    "stored_key_scales",
    "stored_values",
    "stored_weight_format",
    "use_stored_formats",
    "write_model",
    "write_weights",
]
