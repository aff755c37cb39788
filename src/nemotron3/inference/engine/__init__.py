"""The engine: scheduling, prefix cache, memory, and the steps that execute requests."""

from nemotron3.inference.engine.engine import Engine
from nemotron3.inference.engine.stats import EngineStats

__all__ = ["Engine", "EngineStats"]
