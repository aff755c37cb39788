"""A sandbox for programs: they are run, and cannot reach anything."""

from nemotron3.environments.sandbox.backends import Backend, SandboxUnavailableError
from nemotron3.environments.sandbox.limits import Ending, Limits, ProgramResult
from nemotron3.environments.sandbox.sandbox import Sandbox

__all__ = ["Backend", "Ending", "Limits", "ProgramResult", "Sandbox", "SandboxUnavailableError"]
