"""The engine behind SGLang servers: HTTP to one or many of them, or to an sglang-router before them. No jax.

A server is asked only while it is known to have the newest weights: `update_weights` writes them to a directory, has
every server load them and verifies each; a server that fails, or answers with another version, is out until it has been
verified again (a restarted one is sent the weights first). A failed attempt is repeated on whichever server is there;
attempts, waits and the whole turn are bounded, and a turn that comes to nothing ends as StopReason.FAILED.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import pathlib
import time
import uuid
from collections.abc import Callable, Sequence

from orchestra_jax.generation.engine import Completion, OnWatched, Sampling, check_sampling
from orchestra_jax.generation.sglang.connection import Connection, ServerFailure, Sessions
from orchestra_jax.generation.sglang.payload import UnreadableReply, generate_payload, parse_part
from orchestra_jax.generation.sglang.placement import Placement
from orchestra_jax.generation.sglang.request import TurnRequest
from orchestra_jax.generation.sglang.weight_directory import remove_others, version_of, write_version
from orchestra_jax.generation.sglang.weight_sync import send_weights, server_version
from orchestra_jax.tools.limits import Attempt, Limiter, Limits
from orchestra_jax.types import Reason, StopReason

ABORT_WAIT_S = 5.0  # for what an aborted request has sampled
SESSION_HEADER = "X-SMG-Routing-Key"  # what a router keeps a session together by
# (params, directory): writes config.json and safetensors, and says whether these are all weights.
WriteWeights = Callable[[object, pathlib.Path], bool]

_logger = logging.getLogger(__name__)


class EngineUnavailable(RuntimeError):
    """No server has taken the weights in time: there is nobody to roll out with."""


@dataclasses.dataclass
class SGLangConfig:
    """The servers and how they are asked; how they are started: generation.sglang.processes.ServingConfig."""

    urls: tuple[str, ...] = ("http://127.0.0.1:30000",)
    router_url: str = ""  # of an sglang-router before them, which then places the requests
    api_key_variable: str = ""
    weights_directory: str = "/dev/shm/orchestra_jax"  # where trainer and servers both see it
    weight_route: str = "disk"  # or "tensor": within requests, for small models and LoRA without shared directories
    dtype: str = "bfloat16"  # of the weights that are sent, and of the servers' arithmetic
    context_length: int = 1024
    max_concurrent: int = 256  # requests under way, for each server
    timeout_s: float = 1200.0  # of a turn, all its attempts and waits included
    attempt_timeout_s: float = 600.0
    max_attempts: int = 10
    first_wait_s: float = 0.5  # behind the first failure, then twice as long each time, with jitter
    sync_timeout_s: float = 900.0  # until the first server has taken new weights
    is_colocated: bool = False  # servers give their memory back while the trainer works


@dataclasses.dataclass
class _Server:
    connection: Connection
    version: int | None = None  # of its weights, as verified; None: not known, so it is not asked
    is_released: bool = False  # its device memory is the trainer's, or may be
    num_under_way: int = 0
    check: asyncio.Task | None = None
    next_check_s: float = 0.0
    num_failures: int = 0


class SGLangEngine:
    """An `Engine` (engine.py). Needs one `update_weights` before the first `generate`."""

    def __init__(self, config: SGLangConfig, vocab_size: int, write_weights: WriteWeights):
        """ValueError for a config without servers, limits out of range, or a key that is not set."""
        if not config.urls or len(set(config.urls)) < len(config.urls):
            raise ValueError(f"sglang.urls {config.urls} must name servers, each of them once")
        self._config, self._vocab_size, self._write_weights = config, vocab_size, write_weights
        self._root = pathlib.Path(config.weights_directory).absolute()
        limits = Limits(
            config.timeout_s, config.max_concurrent * len(config.urls), 0.0, config.max_attempts, config.first_wait_s
        )
        self._limiter = Limiter(limits)
        self._sessions = Sessions(config.api_key_variable)
        self._servers = {
            url: _Server(Connection(url, self._sessions), is_released=config.is_colocated) for url in config.urls
        }
        self._router = Connection(config.router_url, self._sessions) if config.router_url else None
        self._placement = Placement()
        self._requests: dict[str, TurnRequest] = {}
        self._name = uuid.uuid4().hex[:8]  # requests of a trainer that was killed may still be under way
        self._num_sent = 0
        self._version: int | None = None
        self._directories: list[pathlib.Path] = []  # a whole version and, where it is not the newest, what differs
        self._sync: asyncio.Future | None = None

    async def generate(
        self,
        prompt_tokens: Sequence[int],
        sampling: Sampling,
        *,
        request_id: str,
        session_id: str,
        deadline_s: float | None = None,
        on_watched: OnWatched | None = None,
    ) -> Completion:
        """As the Protocol says. StopReason.FAILED: the servers did not do it within the attempts or `timeout_s`.

        ValueError, before anything is sent, for a prompt that is empty or beyond the context, ids outside the
        vocabulary (a server would die of one), settings that make no sense, a constraint, or a request id that is under
        way; and for what a server says is wrong with the request.
        """
        self._check(prompt_tokens, sampling, request_id)
        request = TurnRequest(prompt_tokens, sampling, request_id, session_id, on_watched)
        self._requests[request_id] = request
        timeout_s = min(deadline_s if deadline_s is not None else float("inf"), self._config.timeout_s)
        request.task = asyncio.ensure_future(self._limiter.run(lambda: self._attempt(request), timeout_s))
        try:
            outcome = await request.task
            is_due = outcome.is_late and deadline_s is not None and deadline_s <= self._config.timeout_s
        except asyncio.CancelledError:
            request.task.cancel()
            if not request.is_aborted:
                raise
            is_due = True
        finally:
            del self._requests[request_id]
        is_ended_early = request.is_aborted or is_due
        return request.completion(request.stop_reason or (StopReason.ABORTED if is_ended_early else StopReason.FAILED))

    def _check(self, prompt_tokens: Sequence[int], sampling: Sampling, request_id: str) -> None:
        try:
            check_sampling(sampling)
        except ValueError as error:
            raise ValueError(f"request {request_id}: {error}") from error
        num_prompt, num_new, most = len(prompt_tokens), sampling.max_new_tokens, self._config.context_length
        if not num_prompt or num_prompt + num_new > most:
            raise ValueError(
                f"request {request_id}: {num_prompt} prompt tokens and {num_new} new ones do not fit "
                f"sglang.context_length {most}, or there is no prompt"
            )
        ids = [*prompt_tokens, *sampling.stop_ids]
        if min(ids) < 0 or max(ids) >= self._vocab_size:
            raise ValueError(
                f"request {request_id}: token ids {min(ids)} to {max(ids)} are not all in [0, {self._vocab_size})"
            )
        if sampling.constraint is not None:
            raise ValueError(f"request {request_id}: a constraint is for engine=jax alone: leave it out")
        if request_id in self._requests:
            raise ValueError(f"request {request_id} is under way: await it first")
        if self._version is None:
            raise ValueError("the servers have been sent no weights: call update_weights before generate")

    async def _attempt(self, request: TurnRequest) -> Attempt[None]:
        """Asks until the turn has ended; retryable where a server failed."""
        server = None
        try:
            server = await self._place(request)
            least_version = self._version
            server.num_under_way += 1
            try:
                while request.stop_reason is None and not request.is_aborted:
                    await self._ask(request, server, least_version)
            finally:
                server.num_under_way -= 1
                request.rid = ""
        except ServerFailure as failure:
            _logger.warning("request %s: %s: %s", request.request_id, failure.reason, failure)
            if server is not None and failure.reason != Reason.RATE_LIMITED:
                for suspect in self._servers.values() if self._router else [server]:
                    suspect.version = None
            return Attempt(None, is_retryable=not request.is_aborted)
        return Attempt(None, is_retryable=False)

    async def _ask(self, request: TurnRequest, server: _Server, least_version: int) -> None:
        """One request to a server; what it sampled is appended, to its end or to where it was interrupted."""
        self._num_sent += 1
        request.rid, request.url = f"{self._name}/{self._num_sent}/{request.request_id}", server.connection.url
        sampling, num_before, num_wanted = request.sampling, len(request.tokens), request.num_left
        body = generate_payload(
            [*request.prompt_tokens, *request.tokens], sampling, num_wanted, request.rid, request.request_id,
            request.is_watching,
        )  # fmt: skip
        connection, timeout_s = self._router or server.connection, self._config.attempt_timeout_s
        headers = {SESSION_HEADER: request.session_id} if self._router else None
        num_known, finish = 0, ""

        def take(reply: object) -> str:
            nonlocal num_known
            try:
                part = parse_part(reply, num_known, num_wanted, self._vocab_size)
            except UnreadableReply as error:
                raise ServerFailure(Reason.UNREADABLE, f"{connection.url}: {error}") from error
            if not all(least_version <= version <= self._version for version in part.versions):
                raise ServerFailure(
                    Reason.SERVER_ERROR,
                    f"{connection.url} sampled with weights {sorted(set(part.versions))} where {self._version} is due",
                )
            num_known += len(part.tokens)
            request.append(part)
            return part.finish

        if request.is_watching:
            async with contextlib.aclosing(connection.events("/generate", body, timeout_s, headers)) as events:
                async for event in events:
                    finish = take(event)
                    if finish or request.stop_reason is not None:
                        break  # a stop sequence: the server hears of it by the closed connection
        else:
            finish = take(await connection.post("/generate", body, timeout_s, headers))
        server.num_failures = 0
        if request.stop_reason is None and len(request.tokens) == num_before:
            raise ServerFailure(Reason.SERVER_ERROR, f"{connection.url} ended a request by {finish!r} with no token")

    async def _place(self, request: TurnRequest) -> _Server:
        """A server that has the newest weights; ServerFailure if none has and none can be brought to."""
        if self._sync is not None:
            await asyncio.shield(self._sync)
        checks = [self._checking(server) for server in self._servers.values() if server.version != self._version]
        if checks and len(checks) == len(self._servers):
            await asyncio.wait(checks, timeout=self._config.attempt_timeout_s, return_when=asyncio.FIRST_COMPLETED)
        loads = {url: server.num_under_way for url, server in self._servers.items() if server.version == self._version}
        if not loads:
            raise ServerFailure(Reason.NO_CONNECTION, f"none of {[*self._servers]} answers with the newest weights")
        return self._servers[self._placement.choose(request.session_id, request.prompt_tokens, loads)]

    def _checking(self, server: _Server) -> asyncio.Task:
        """The one check of a server that is under way in this loop, begun if it is not."""
        loop = asyncio.get_running_loop()
        if server.check is None or server.check.done() or server.check.get_loop() is not loop:
            server.check = loop.create_task(self._check_server(server))
        return server.check

    async def _check_server(self, server: _Server) -> None:
        """Verifies the server's weights, sends them if they are others, and remembers what became of it."""
        wait_s = server.next_check_s - time.monotonic()
        if wait_s > 0:
            await asyncio.sleep(wait_s)
        version = self._version
        try:
            there = await server_version(server.connection)
            if there != str(version):
                await self._send(server, self._needed_by(there), version)
            server.version, server.num_failures, server.is_released = version, 0, False
        except (ServerFailure, ValueError) as failure:
            _logger.warning("%s is out: %s", server.connection.url, failure)
            server.version = None
            server.num_failures += 1
            longest_s = self._limiter.limits.longest_wait_s
            wait_s = min(longest_s, self._config.first_wait_s * 2 ** min(server.num_failures, 10))
            server.next_check_s = time.monotonic() + wait_s

    def _needed_by(self, label: str) -> list[pathlib.Path]:
        """What a server with weights `label` is to load: what differs is enough for one that has had the whole."""
        since_whole = range(version_of(self._directories[0]), self._version + 1)
        has_whole = label.isdigit() and int(label) in since_whole
        return self._directories[-1:] if has_whole else self._directories

    async def abort(self, request_id: str) -> None:
        """As the Protocol says: waits for what the server has sampled, for ABORT_WAIT_S at most."""
        request = self._requests.get(request_id)
        if request is None or request.task is None:
            return
        request.is_aborted = True
        if request.rid:  # at a server; a router passes no aborts on
            urls = [*self._servers] if self._router else [request.url]
            for url in urls:
                with contextlib.suppress(ServerFailure, ValueError):
                    await self._servers[url].connection.post("/abort_request", {"rid": request.rid}, ABORT_WAIT_S)
            await asyncio.wait([request.task], timeout=ABORT_WAIT_S)
        request.task.cancel()

    async def update_weights(self, params: object, version: int) -> None:
        """Every server that answers has `version`, verified, when this returns; the others are sent it before they
        are asked again. EngineUnavailable if there is none for `sync_timeout_s`.
        """
        path, is_whole = await asyncio.to_thread(
            write_version, self._root, version, lambda directory: self._write_weights(params, directory)
        )
        previous = self._directories
        assert is_whole or previous, "the first weights of an engine are whole"
        self._sync = asyncio.get_running_loop().create_future()
        try:
            self._directories = [path] if is_whole else [previous[0], path]
            self._version = version
            self._placement.forget()
            await self._send_to_all()
        finally:
            self._sync.set_result(None)
            self._sync = None
        await asyncio.to_thread(remove_others, self._root, self._directories)

    async def _send_to_all(self) -> None:
        give_up_s, wait_s = time.monotonic() + self._config.sync_timeout_s, self._config.first_wait_s
        while True:
            failures = await asyncio.gather(*map(self._send_to, self._servers.values()))
            if None in failures:
                return
            if time.monotonic() + wait_s > give_up_s:
                raise EngineUnavailable(f"no server took the weights of version {self._version}: {'; '.join(failures)}")
            await asyncio.sleep(wait_s)
            wait_s = min(2 * wait_s, self._limiter.limits.longest_wait_s)

    async def _send_to(self, server: _Server) -> str | None:
        """Why the server does not have the newest weights, or None."""
        server.version, directories = None, self._directories
        try:
            if len(directories) > 1:
                directories = self._needed_by(await server_version(server.connection))
            await self._send(server, directories, self._version)
        except (ServerFailure, ValueError) as failure:
            _logger.warning("%s has not taken version %d: %s", server.connection.url, self._version, failure)
            return str(failure)
        server.version, server.num_failures, server.is_released = self._version, 0, False
        return None

    async def _send(self, server: _Server, directories: Sequence[pathlib.Path], version: int) -> None:
        timeout_s, route = self._config.sync_timeout_s, self._config.weight_route
        await send_weights(server.connection, directories, version, timeout_s, server.is_released, route)

    async def forget(self) -> None:
        """Where sessions were. What servers have cached is theirs: it changes no more than last bits."""
        self._placement.forget()

    async def release_memory(self) -> None:
        """Where trainer and servers share devices: the servers give theirs back until the next `update_weights`."""
        for server in self._servers.values() if self._config.is_colocated else ():
            server.version, server.is_released = None, True
            body = {"tags": ["kv_cache", "weights", "cuda_graph"]}
            try:
                await server.connection.post("/release_memory_occupation", body, self._config.attempt_timeout_s)
            except (ServerFailure, ValueError) as failure:
                _logger.warning("%s has not given its memory back: %s", server.connection.url, failure)

    async def close(self) -> None:
        """Cancels every `generate` that waits, and closes the connections of this event loop."""
        for request in list(self._requests.values()):
            request.task.cancel()
        await self._sessions.close()
