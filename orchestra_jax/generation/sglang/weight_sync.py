"""New weights into one running server, from a directory: pause, update, verify, continue.

Requests under way are paused by "retract": what they have sampled stays, their caches are computed anew under the new
weights, and each token keeps the version that it came from. Whatever happens, the server is told to go on.
"""

from __future__ import annotations

import asyncio
import logging
import pathlib
from collections.abc import Sequence

from orchestra_jax.generation.sglang.connection import Connection, ServerFailure
from orchestra_jax.types import Reason

CONTROL_TIMEOUT_S = 10.0
NUM_CONTROL_ATTEMPTS = 3
FLUSH_WAIT_S = 0.2
NUM_FLUSHES = 25

_logger = logging.getLogger(__name__)


async def server_version(connection: Connection, timeout_s: float = CONTROL_TIMEOUT_S) -> str:
    """The label of the weights that the server has now; ServerFailure for an answer that has none."""
    about = await connection.get("/model_info", timeout_s)
    if not isinstance(about, dict) or "weight_version" not in about:
        raise ServerFailure(Reason.UNREADABLE, f"{connection.url}/model_info tells no weight_version")
    return str(about["weight_version"])


async def send_weights(
    connection: Connection,
    directories: Sequence[pathlib.Path],
    version: int,
    timeout_s: float,
    is_released: bool = False,
) -> None:
    """Has the server load `directories`, one after the other, and verifies that it then has `version`.

    is_released: the server has given its memory back, which it takes again, the weights' first. ServerFailure if it
    does not get there; the server may then hold any of the weights, and is not to be believed.
    """
    try:
        if is_released:
            await _control(connection, "/resume_memory_occupation", {"tags": ["weights"]})
        await _control(connection, "/pause_generation", {"mode": "retract"})
        for directory in directories:
            await _load(connection, directory, version, timeout_s)
        if is_released:
            await _control(connection, "/resume_memory_occupation", {"tags": ["kv_cache", "cuda_graph"]})
    finally:
        await _continue(connection)
    there = await server_version(connection)
    if there != str(version):
        raise ServerFailure(
            Reason.SERVER_ERROR, f"{connection.url} has weights {there!r} behind an update to {version}"
        )


async def _load(connection: Connection, directory: pathlib.Path, version: int, timeout_s: float) -> None:
    body = {
        "model_path": str(directory),
        "load_format": "safetensors",  # the server's own may be "dummy"
        "flush_cache": True,
        "abort_all_requests": False,
        "weight_version": str(version),
    }
    try:
        answer = await connection.post("/update_weights_from_disk", body, timeout_s)
    except ValueError as error:  # a 400 is this call's way to say that it failed
        if "cache was not flushed" not in str(error):
            raise ServerFailure(Reason.SERVER_ERROR, str(error)) from error
        await _flush_and_label(connection, version)
        return
    if not isinstance(answer, dict) or answer.get("success") is not True:
        raise ServerFailure(Reason.UNREADABLE, f"{connection.url} answered an update with {str(answer)[:200]}")


async def _flush_and_label(connection: Connection, version: int) -> None:
    """The new weights are live, the old cache and the old label too: mends both."""
    for _ in range(NUM_FLUSHES):
        try:
            await connection.post("/flush_cache", {}, CONTROL_TIMEOUT_S)
            break
        except ValueError:  # requests still run or queue
            await asyncio.sleep(FLUSH_WAIT_S)
    else:
        raise ServerFailure(Reason.SERVER_ERROR, f"{connection.url} does not flush its cache of the old weights")
    await _control(connection, "/update_weight_version", {"new_version": str(version), "abort_all_requests": False})


async def _control(connection: Connection, path: str, body: dict) -> None:
    try:
        await connection.post(path, body, CONTROL_TIMEOUT_S)
    except ValueError as error:
        raise ServerFailure(Reason.SERVER_ERROR, str(error)) from error


async def _continue(connection: Connection) -> None:
    """Also where nothing is paused, which the server does not mind; one that is gone has nothing to go on with."""
    for attempt in range(NUM_CONTROL_ATTEMPTS):
        try:
            return await _control(connection, "/continue_generation", {})
        except ServerFailure as failure:
            if attempt == NUM_CONTROL_ATTEMPTS - 1:
                _logger.warning("%s was not told to go on: %s", connection.url, failure)
            else:
                await asyncio.sleep(FLUSH_WAIT_S)
