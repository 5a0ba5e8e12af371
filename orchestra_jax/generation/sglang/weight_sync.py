"""New weights into one running server, from a directory: pause, update, verify, continue.

By "disk" the server reads the directory itself, by "tensor" its tensors travel in requests, which suits small models
and LoRA where trainer and servers share no file system.

Requests under way are paused by "retract": what they have sampled stays, their caches are computed anew under the new
weights, and each token keeps the version that it came from. Whatever happens, the server is told to go on.
"""

from __future__ import annotations

import asyncio
import base64
import http
import logging
import pathlib
from collections.abc import Sequence

from orchestra_jax.generation.sglang.connection import Connection, Refused, ServerFailure
from orchestra_jax.generation.sglang.tensor_payload import tensor_payloads
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
    route: str = "disk",
) -> None:
    """Has the server load `directories`, one after the other, and verifies that it then has `version`.

    is_released: the server has given its memory back, which it takes again, the weights' first. route: one of ROUTES.
    ServerFailure if it does not get there; the server may then hold any of the weights, and is not to be believed.
    """
    try:
        if is_released:
            await _control(connection, "/resume_memory_occupation", {"tags": ["weights"]})
        await _control(connection, "/pause_generation", {"mode": "retract"})
        for directory in directories:
            await ROUTES[route](connection, directory, version, timeout_s)
        if is_released:
            await _control(connection, "/resume_memory_occupation", {"tags": ["kv_cache", "cuda_graph"]})
    finally:
        await _continue(connection)
    there = await server_version(connection)
    if there != str(version):
        raise ServerFailure(
            Reason.SERVER_ERROR, f"{connection.url} has weights {there!r} behind an update to {version}"
        )


async def _load_from_disk(connection: Connection, directory: pathlib.Path, version: int, timeout_s: float) -> None:
    body = {
        "model_path": str(directory),
        "load_format": "safetensors",  # the server's own may be "dummy"
        "flush_cache": True,
        "abort_all_requests": False,
        "weight_version": str(version),
    }
    await _update(connection, "/update_weights_from_disk", body, version, timeout_s)


async def _load_tensors(connection: Connection, directory: pathlib.Path, version: int, timeout_s: float) -> None:
    """Each rank of the server reads a copy of its own; the last bucket brings the version."""
    num_ranks = await _num_ranks(connection)
    payloads = tensor_payloads(directory / "model.safetensors")
    has_session = await _begin_session(connection, timeout_s)
    try:
        payload = await asyncio.to_thread(next, payloads)
        while payload is not None:
            following = await asyncio.to_thread(next, payloads, None)
            is_last = following is None
            body = {
                "serialized_named_tensors": [base64.b64encode(payload).decode()] * num_ranks,
                "flush_cache": is_last,
                "abort_all_requests": False,
                "weight_version": str(version) if is_last else None,
            }
            await _update(connection, "/update_weights_from_tensor", body, version, timeout_s)
            payload = following
    finally:
        if has_session:
            await _control(connection, "/end_weight_update", {}, timeout_s)


ROUTES = {"disk": _load_from_disk, "tensor": _load_tensors}


async def _num_ranks(connection: Connection) -> int:
    try:
        about = await connection.get("/server_info", CONTROL_TIMEOUT_S)
    except Refused:
        about = await connection.get("/get_server_info", CONTROL_TIMEOUT_S)  # of servers before that name
    if not isinstance(about, dict) or not isinstance(about.get("tp_size"), int):
        raise ServerFailure(Reason.UNREADABLE, f"{connection.url}/server_info tells no tp_size")
    return about["tp_size"]


async def _begin_session(connection: Connection, timeout_s: float) -> bool:
    """Whether the server wants a session (since 0.5.21), then open. One that a killed trainer left behind is ended."""
    for _ in range(2):
        try:
            await connection.post("/begin_weight_update", {"selector": "all"}, timeout_s)
            return True
        except Refused as refused:
            if refused.status == http.HTTPStatus.NOT_FOUND:
                return False
            if "already open" not in str(refused):
                raise ServerFailure(Reason.SERVER_ERROR, str(refused)) from refused
        await _control(connection, "/end_weight_update", {}, timeout_s)
    raise ServerFailure(Reason.SERVER_ERROR, f"{connection.url} does not end an update of weights that is not this one")


async def _update(connection: Connection, path: str, body: dict, version: int, timeout_s: float) -> None:
    try:
        answer = await connection.post(path, body, timeout_s)
    except Refused as error:  # a 400 is this call's way to say that it failed
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
        except Refused:  # requests still run or queue
            await asyncio.sleep(FLUSH_WAIT_S)
    else:
        raise ServerFailure(Reason.SERVER_ERROR, f"{connection.url} does not flush its cache of the old weights")
    await _control(connection, "/update_weight_version", {"new_version": str(version), "abort_all_requests": False})


async def _control(connection: Connection, path: str, body: dict, timeout_s: float = CONTROL_TIMEOUT_S) -> None:
    try:
        await connection.post(path, body, timeout_s)
    except Refused as error:
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
