"""Tasks and rewards: environments for reinforcement learning, each with a verifier."""

from nemotron3.environments.checks import EnvironmentReport, check_environment
from nemotron3.environments.environment import Environment
from nemotron3.environments.gym_server import GymServerEnvironment
from nemotron3.environments.registry import BUILT_IN, environment_class, load_environment
from nemotron3.environments.response import TaskResponse, from_items, to_dict, to_items
from nemotron3.environments.rows import (
    Row,
    Split,
    environment_of,
    field_of,
    make_row,
    prompt_of,
    prompt_text,
    split_of,
    tools_of,
)
from nemotron3.environments.tool_classes import ToolClassEnvironment
from nemotron3.environments.verification import (
    Failure,
    FailureKind,
    RolloutFailedError,
    Verification,
)

__all__ = [
    "BUILT_IN",
    "Environment",
    "EnvironmentReport",
    "Failure",
    "FailureKind",
    "GymServerEnvironment",
    "RolloutFailedError",
    "Row",
    "Split",
    "TaskResponse",
    "ToolClassEnvironment",
    "Verification",
    "check_environment",
    "environment_class",
    "environment_of",
    "field_of",
    "from_items",
    "load_environment",
    "make_row",
    "prompt_of",
    "prompt_text",
    "split_of",
    "to_dict",
    "to_items",
    "tools_of",
]
