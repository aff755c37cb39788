"""Endpoints that replace the weights of a running server, for reinforcement learning.

They exist only on a server with `ServerSettings.weights_folder`, which requires an API key, and
they read model directories below that folder only.
"""

import logging
from pathlib import Path

from fastapi import FastAPI
from fastapi.responses import JSONResponse

from nemotron3.errors import CheckpointError, ConfigError
from nemotron3.inference.async_llm import AsyncLLM
from nemotron3.inference.model_runner.weights import RunningRequests
from nemotron3.server.http.bodies import Body
from nemotron3.server.http.error_handlers import ERROR_RESPONSES
from nemotron3.server.http.errors import APIError, client_names, invalid_request

log = logging.getLogger("nemotron3.server")


class UpdateWeightsBody(Body):
    """The new weights, and how running requests continue."""

    model_path: str
    """A model directory, relative to the server's folder for weights."""
    weight_version: int | None = None
    running: RunningRequests = "recompute"


def add_weights(api: FastAPI, llm: AsyncLLM, folder: Path) -> None:
    """Add the endpoints that replace weights and pause generation."""

    @api.post("/update_weights", responses=ERROR_RESPONSES)
    async def update_weights(body: UpdateWeightsBody) -> JSONResponse:
        """Load the weights of a model directory into the served model."""
        path = directory_below(folder, body.model_path)
        try:
            with client_names({"version": "weight_version"}):
                version = await llm.update_weights(
                    path, version=body.weight_version, running=body.running
                )
        except (CheckpointError, ConfigError) as error:
            if isinstance(error, ConfigError) and error.field is not None:
                raise
            raise invalid_request(
                f"model_path is {body.model_path!r}: {error}", "model_path"
            ) from error
        log.info("weights of version %d, from %s", version, path)
        return JSONResponse({"weight_version": version})

    @api.get("/weight_version", responses=ERROR_RESPONSES)
    async def weight_version() -> JSONResponse:
        """Version of the weights with which the next token is sampled."""
        return JSONResponse({"weight_version": llm.weight_version})

    @api.post("/pause", responses=ERROR_RESPONSES)
    async def pause() -> JSONResponse:
        """Pause all requests after the current step."""
        await llm.pause_generation()
        return JSONResponse({"is_paused": llm.is_paused})

    @api.post("/resume", responses=ERROR_RESPONSES)
    async def resume() -> JSONResponse:
        """Resume paused requests."""
        await llm.resume_generation()
        return JSONResponse({"is_paused": llm.is_paused})

    @api.get("/is_paused", responses=ERROR_RESPONSES)
    async def is_paused() -> JSONResponse:
        """Whether generation is paused."""
        return JSONResponse({"is_paused": llm.is_paused})


def directory_below(folder: Path, path: str) -> Path:
    """Resolve a model directory in the folder; nothing outside of the folder is read.

    Symbolic links are followed. A directory that contains a link out of the folder is refused.
    """
    try:
        base = folder.resolve()
        found = (base / path).resolve()
        if found == base or not found.is_relative_to(base):
            raise _no_model(path, "a directory below the server's folder for weights, and is not")
        if not found.is_dir():
            raise _no_model(path, "a directory there, and is not")
        leaves = [file.name for file in found.iterdir() if not file.resolve().is_relative_to(base)]
    # A null byte, a cycle of links (RuntimeError before Python 3.13), or missing permissions.
    except (OSError, ValueError, RuntimeError) as error:
        raise _no_model(path, f"a directory that can be followed ({error})") from error
    if leaves:
        raise _no_model(path, f"free of links out of the server's folder, and {leaves[0]} is one")
    return found


def _no_model(path: str, wanted: str) -> APIError:
    return invalid_request(f"model_path is {path!r}; it must be {wanted}", "model_path")
