"""Bodies of requests: JSON objects that are strict and closed.

Types are not converted ("0.5" is not a number), and unknown names are refused. Parameters of other
servers that are not supported are refused with an alternative, unless their value asks for the
default behaviour (`Unsupported.harmless`). Ranges are not checked here but in `SamplingParams`, for
all entry points.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, cast

from pydantic import BaseModel, ConfigDict, model_validator
from pydantic_core import PydanticCustomError


@dataclass(frozen=True)
class Unsupported:
    """An unsupported parameter of other servers: the alternative, and values without effect."""

    remedy: str
    harmless: tuple[Any, ...] = ()


class Body(BaseModel):
    """A JSON object with the fields of its class and no others."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)
    unsupported: ClassVar[Mapping[str, Unsupported]] = {}

    @model_validator(mode="before")
    @classmethod
    def _refuse_unsupported(cls, value: Any) -> Any:
        if not isinstance(value, Mapping):
            return value
        kept: dict[Any, Any] = dict(cast(Mapping[Any, Any], value))
        for name, rule in cls.unsupported.items():
            if name not in kept:
                continue
            given = kept.pop(name)
            if given is not None and given not in rule.harmless:
                raise PydanticCustomError(
                    "unsupported", "{param} is not supported; {remedy}",
                    {"param": name, "remedy": rule.remedy},
                )  # fmt: skip
        return kept
