"""HTTP to one SGLang server: bodies in, bodies out; what goes wrong on the way is a ServerFailure with its Reason.

A 4xx that says that the request itself is wrong is a Refused instead: it would be wrong the next time too.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import weakref
from collections.abc import AsyncIterator

import aiohttp

from orchestra_jax.types import Reason

NUM_SHOWN = 300  # characters of a server's answer in a message
RETRYABLE_STATUSES = (408, 409, 425, 429)  # and 5xx


class ServerFailure(Exception):
    """A server that could not do what it was asked to; another attempt, or another server, may do better."""

    def __init__(self, reason: Reason, told: str):
        super().__init__(told)
        self.reason = reason


class Refused(ValueError):
    """A 4xx that says that the request itself is wrong, or that the server does not know its path."""

    def __init__(self, status: int, told: str):
        super().__init__(told)
        self.status = status


class Sessions:
    """An aiohttp session for each event loop: a run opens one loop after the other, and connections belong to one.

    Whoever runs a loop with asyncio.run need not close anything: it closes a loop's async generators at its end, and
    the session lives in one.
    """

    def __init__(self, api_key_variable: str = ""):
        """ValueError if the environment variable that is to hold the servers' key is not set."""
        key = os.environ.get(api_key_variable, "") if api_key_variable else ""
        if api_key_variable and not key:
            raise ValueError(f"the environment variable {api_key_variable!r} is not set: put the servers' key into it")
        self._headers = {"Authorization": f"Bearer {key}"} if key else {}
        self._lives: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()

    async def get(self) -> aiohttp.ClientSession:
        loop = asyncio.get_running_loop()
        if loop not in self._lives:
            life = self._life()
            # Kept before the first wait: two requests of one loop share the session.
            self._lives[loop] = life, asyncio.ensure_future(anext(life))
        opened = self._lives[loop][1]
        return opened.result() if opened.done() else await asyncio.shield(opened)

    async def close(self) -> None:
        """Closes the session of the running loop, if it has one."""
        life, _ = self._lives.pop(asyncio.get_running_loop(), (None, None))
        if life is not None:
            await life.aclose()

    async def _life(self) -> AsyncIterator[aiohttp.ClientSession]:
        connector = aiohttp.TCPConnector(limit=0)  # the engine limits what is under way
        async with aiohttp.ClientSession(
            connector=connector, headers=self._headers, timeout=aiohttp.ClientTimeout(total=None)
        ) as session:
            yield session


class Connection:
    """One server at `url`."""

    def __init__(self, url: str, sessions: Sessions):
        self.url, self._sessions = url.rstrip("/"), sessions

    async def post(self, path: str, body: dict, timeout_s: float, headers: dict[str, str] | None = None) -> object:
        """The JSON of the reply, or its text where it is none. ServerFailure, or Refused."""
        async with self._ask("POST", path, body, timeout_s, headers) as response:
            return _decoded(await response.text())

    async def get(self, path: str, timeout_s: float) -> object:
        async with self._ask("GET", path, None, timeout_s, None) as response:
            return _decoded(await response.text())

    async def events(
        self, path: str, body: dict, timeout_s: float, headers: dict[str, str] | None = None
    ) -> AsyncIterator[object]:
        """The JSON of each server-sent event up to [DONE]. ServerFailure if the stream ends before that."""
        async with self._ask("POST", path, body, timeout_s, headers) as response:
            rest = b""
            async for some in response.content.iter_any():
                *lines, rest = (rest + some).split(b"\n")
                for line in lines:
                    text = line.removeprefix(b"data:").strip()
                    if text == b"[DONE]":
                        return
                    if line.startswith(b"data:"):
                        yield _event(text, self.url)
        raise ServerFailure(Reason.NO_CONNECTION, f"{self.url} ended a stream in the middle")

    @contextlib.asynccontextmanager
    async def _ask(self, method: str, path: str, body: dict | None, timeout_s: float, headers):
        where = f"{self.url}{path}"
        session = await self._sessions.get()
        try:
            async with (
                asyncio.timeout(timeout_s),
                session.request(method, where, json=body, headers=headers) as response,
            ):
                if response.status >= 400:
                    _refuse(where, response.status, await response.text(errors="replace"))
                yield response
        except TimeoutError as error:
            raise ServerFailure(Reason.DEADLINE, f"{where} gave no answer in {timeout_s} s") from error
        except (aiohttp.ClientError, ConnectionError) as error:
            raise ServerFailure(Reason.NO_CONNECTION, f"{where}: {type(error).__name__} {error}") from error
        except UnicodeDecodeError as error:
            raise ServerFailure(Reason.UNREADABLE, f"{where}: the reply is no text") from error


def _refuse(where: str, status: int, text: str) -> None:
    told = f"{where} answered {status}: {text[:NUM_SHOWN]}"
    if status == 429:
        raise ServerFailure(Reason.RATE_LIMITED, told)
    if status >= 500 or status in RETRYABLE_STATUSES:
        raise ServerFailure(Reason.SERVER_ERROR, told)
    raise Refused(status, told)


def _decoded(text: str) -> object:
    try:
        return json.loads(text)
    except ValueError:
        return text


def _event(text: bytes, url: str) -> object:
    try:
        event = json.loads(text)
    except ValueError as error:
        raise ServerFailure(Reason.UNREADABLE, f"{url}: an event that is no JSON") from error
    if isinstance(event, dict) and "error" in event:
        raise ServerFailure(Reason.SERVER_ERROR, f"{url}: {str(event['error'])[:NUM_SHOWN]}")
    return event
