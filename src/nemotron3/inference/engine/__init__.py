"""The engine: scheduling, prefix cache, memory, and the steps that execute requests."""

from nemotron3.inference.engine.engine import Engine, EngineStats

__all__ = ["Engine", "EngineStats"]
