"""Runs a Python program in a process of its own, under limits, in milliseconds.

A cold interpreter costs a fifth of a second; a fork of a warm one costs a few milliseconds. `PythonSandbox` therefore
starts one server (program_server.py, standard library only, with an empty environment) at the first program. For each
program the server forks a runner, which forks the program, reads what it prints, enforces the wall clock by killing it,
and sends the result back. Programs of several threads run side by side.

What a program may not do: run longer than `timeout_s`, hold more than `memory_bytes` of address space, start a process,
change a file, read one that is not the interpreter's, open a socket, or signal another process. How firmly it is kept
from all this depends on the level of isolation (isolation.py).
"""

from __future__ import annotations

import dataclasses
import enum
import hashlib
import json
import os
import socket
import subprocess
import threading
import time

from orchestra_jax.tools.sandbox.isolation import STRONGEST, isolate

MAX_CACHED_RESULTS = 8_192
SERVER = os.path.join(os.path.dirname(os.path.abspath(__file__)), "program_server.py")
ANSWER_GRACE_S = 5.0  # beyond the program's own limit, before the server counts as gone


class ProgramStatus(enum.StrEnum):
    OK = "ok"
    ERROR = "error"  # an exception, a non-zero exit, or a signal
    TIMEOUT = "timeout"


@dataclasses.dataclass(frozen=True)
class ProgramResult:
    """What a program did. `stderr_line` is the last line of its stderr: an exception's own line, or a signal's name.

    `service_s` is the wall time from the fork to the end; a cached result keeps the time of the run it came from.
    """

    status: ProgramStatus
    stdout: str
    stderr_line: str
    service_s: float


class PythonSandbox:
    """Runs programs under fixed limits and remembers their results by content. Safe to call from several threads.

    timeout_s: wall-clock limit of one program. memory_bytes: its address space, the interpreter (about 40 MB) included.
    isolation: a level of isolation.py, or "strongest" for the best that this machine gives; `level` says which it is.
    Raises ValueError for limits that no program can live under, and a level that cannot be had.
    """

    def __init__(self, timeout_s: float = 5.0, memory_bytes: int = 256 * 2**20, isolation: str = STRONGEST):
        if timeout_s <= 0:
            raise ValueError(f"timeout_s must be positive, got {timeout_s}")
        if memory_bytes < 64 * 2**20:
            raise ValueError(f"memory_bytes must be at least 64 MiB (the interpreter needs 40), got {memory_bytes}")
        self._isolation = isolate(isolation, SERVER)
        self.level = self._isolation.level
        syscall_filter = self._isolation.syscall_filter.hex()
        self._limits = {"timeout_s": timeout_s, "memory_bytes": memory_bytes, "syscall_filter": syscall_filter}
        self._lock = threading.Lock()  # guards the server, the control socket and the cache
        self._server: subprocess.Popen[bytes] | None = None
        self._control: socket.socket | None = None
        self._results: dict[bytes, ProgramResult] = {}  # by _key

    def run(self, program: str) -> ProgramResult:
        """Runs `program` as a script, or returns the result of an earlier run of the same text."""
        remembered = self.remembered(program)
        if remembered is not None:
            return remembered
        request, start_s = json.dumps({"program": program, **self._limits}).encode(), time.monotonic()
        result = self._ask(request)
        if result is None:  # not remembered: it says nothing about the program's own output
            killed = "the process that ran the program was killed"
            return ProgramResult(ProgramStatus.ERROR, "", killed, time.monotonic() - start_s)
        with self._lock:
            if len(self._results) >= MAX_CACHED_RESULTS:
                self._results.pop(next(iter(self._results)))  # the oldest: dicts keep their order
            self._results[_key(program)] = result
        return result

    def remembered(self, program: str) -> ProgramResult | None:
        """The result of an earlier run of the same text, at once; None if there is none."""
        with self._lock:
            return self._results.get(_key(program))

    def close(self) -> None:
        """Ends the server; a later `run` starts a new one."""
        with self._lock:
            self._stop()

    def __enter__(self) -> PythonSandbox:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _ask(self, request: bytes) -> ProgramResult | None:
        for _ in range(2):  # a server that died with the request in its queue is replaced by the second send
            with self._connect() as connection:
                try:
                    connection.sendall(request)
                    connection.shutdown(socket.SHUT_WR)
                    answer = _read_all(connection)
                except OSError:  # reset, or silent past its limit: the runner is gone
                    answer = b""
            if answer:
                fields = json.loads(answer)
                return ProgramResult(**{**fields, "status": ProgramStatus(fields["status"])})
        return None

    def _connect(self) -> socket.socket:
        """A socket whose other end a fresh runner holds."""
        ours, theirs = socket.socketpair()
        ours.settimeout(self._limits["timeout_s"] + ANSWER_GRACE_S)
        with self._lock, theirs:
            if self._server is None or self._server.poll() is not None:
                self._start()
            try:
                socket.send_fds(self._control, [b"r"], [theirs.fileno()])
            except OSError:  # died between the check and the send
                self._start()
                socket.send_fds(self._control, [b"r"], [theirs.fileno()])
        return ours

    def _start(self) -> None:
        self._stop()
        self._control, child_end = socket.socketpair()
        with child_end:
            self._server = subprocess.Popen(
                [*self._isolation.command, "-P", "-s", "-S", "-B", "-X", "utf8", os.path.realpath(SERVER)],
                stdin=child_end,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                env={"PYTHONHASHSEED": "0"},  # no secrets, and sets of strings iterate the same way every time
                cwd="/",
                start_new_session=True,
            )

    def _stop(self) -> None:
        if self._server is None:
            return
        self._control.close()
        self._server.kill()
        self._server.wait()
        self._server = None


def _read_all(connection: socket.socket) -> bytes:
    chunks = []
    while chunk := connection.recv(65_536):
        chunks.append(chunk)
    return b"".join(chunks)


def _key(program: str) -> bytes:
    """Shorter than the program; which may hold half of a surrogate pair, as JSON from a model can."""
    return hashlib.sha256(program.encode("utf-8", "surrogatepass")).digest()
