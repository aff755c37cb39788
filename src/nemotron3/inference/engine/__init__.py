"""The engine: which sequences run in a step, and where their states are kept."""

from nemotron3.inference.engine.engine import Engine, EngineStats

__all__ = ["Engine", "EngineStats"]
