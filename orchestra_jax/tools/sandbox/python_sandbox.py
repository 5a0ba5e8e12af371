"""Runs a Python program in a process of its own, under limits, in milliseconds.

A cold interpreter costs a fifth of a second; a fork of a warm one costs a few milliseconds. `PythonSandbox` therefore
starts one server (this very file run as a script, standard library only, with an empty environment) at the first
program. For each program the server forks a runner, which forks the program, reads what it prints, enforces the wall
clock by killing the program's process group, and sends the result back. Programs of several threads run side by side.

What a program may not do: run longer than `timeout_s`, hold more than `memory_bytes` of address space, start a process,
change a file, open a socket, or signal another process. The first two are resource limits of the kernel;
the others are limits where the kernel has one (it exempts root from the limit on processes) and an audit hook besides.

This is no security boundary: an audit hook can be got round from inside the interpreter, and files that this user may
read stay readable. It contains the accidents of a model that writes programs, not a determined attacker; for those run
the whole job in a container.
"""

from __future__ import annotations

import dataclasses
import enum
import gc
import hashlib
import importlib
import json
import math
import os
import resource
import select
import signal
import socket
import subprocess
import sys
import threading
import time
import types

MAX_STDOUT_BYTES = 16_384
CUT_MARK = "\n[output cut]"
MAX_STDERR_BYTES = 65_536  # a traceback's last line is its message, so the end is what is kept
MAX_LINE_CHARS = 300
MAX_CACHED_RESULTS = 8_192
ANSWER_GRACE_S = 5.0  # beyond the program's own limit, before the server counts as gone

# Loaded before the fork, so that no program pays for them; traceback for the interpreter's own report.
WARM_MODULES = "collections datetime decimal fractions functools itertools math random re statistics traceback".split()

_WRITE_FLAGS = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
_REFUSED_EVENTS = frozenset(
    "os.fork os.forkpty os.posix_spawn os.exec os.system os.spawn os.startfile subprocess.Popen pty.spawn "
    "os.killpg os.remove os.rename os.rmdir os.mkdir os.link os.symlink os.truncate "
    "os.chmod os.chown os.chflags os.utime ctypes.dlopen".split()
)


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
    Raises ValueError for limits that no program can live under.
    """

    def __init__(self, timeout_s: float = 5.0, memory_bytes: int = 256 * 2**20):
        if timeout_s <= 0:
            raise ValueError(f"timeout_s must be positive, got {timeout_s}")
        if memory_bytes < 64 * 2**20:
            raise ValueError(f"memory_bytes must be at least 64 MiB (the interpreter needs 40), got {memory_bytes}")
        self._limits = {"timeout_s": timeout_s, "memory_bytes": memory_bytes}
        self._lock = threading.Lock()  # guards the server, the control socket and the cache
        self._server: subprocess.Popen[bytes] | None = None
        self._control: socket.socket | None = None
        self._results: dict[str, ProgramResult] = {}

    def run(self, program: str) -> ProgramResult:
        """Runs `program` as a script, or returns the result of an earlier run of the same text."""
        request = json.dumps({"program": program, **self._limits}).encode()
        key = hashlib.sha256(request).hexdigest()
        with self._lock:
            cached = self._results.get(key)
        if cached is not None:
            return cached
        result = self._ask(request)
        if result is None:  # not remembered: it says nothing about the program's own output
            return ProgramResult(ProgramStatus.ERROR, "", "the process that ran the program was killed", 0.0)
        with self._lock:
            if len(self._results) >= MAX_CACHED_RESULTS:
                self._results.pop(next(iter(self._results)))  # the oldest: dicts keep their order
            self._results[key] = result
        return result

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
                [sys.executable, "-P", "-s", "-S", "-B", "-X", "utf8", os.path.abspath(__file__)],
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


def _serve() -> None:
    """The server: one runner per file descriptor that arrives on stdin's socket, until its owner closes it."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the kernel reaps the runners
    control = socket.socket(fileno=0)
    while True:
        _, descriptors, _, _ = socket.recv_fds(control, 1, 1)
        if not descriptors:
            return
        if os.fork() == 0:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            connection = socket.socket(fileno=descriptors[0])
            result = _supervise(**json.loads(_read_all(connection)))
            connection.sendall(json.dumps(result).encode())
            os._exit(0)
        os.close(descriptors[0])


def _supervise(program: str, timeout_s: float, memory_bytes: int) -> dict[str, object]:
    """The runner: forks the program, reads its pipes up to the deadline, kills its process group, reports."""
    stdout_read, stdout_write = os.pipe()
    stderr_read, stderr_write = os.pipe()
    start_s = time.monotonic()
    pid = os.fork()
    if pid == 0:
        _run_here(program, timeout_s, memory_bytes, stdout_write, stderr_write)
        sys.exit(0)  # an exception leaves through the top of the script: traceback on stderr, status 1
    os.close(stdout_write)
    os.close(stderr_write)

    texts = {stdout_read: bytearray(), stderr_read: bytearray()}
    wait_status = _read_until_exit(pid, texts, start_s + timeout_s)
    is_timeout = wait_status is None
    _kill_group(pid)
    if is_timeout:
        _, wait_status = os.waitpid(pid, 0)

    stdout = texts[stdout_read][:MAX_STDOUT_BYTES].decode(errors="replace")
    if len(texts[stdout_read]) > MAX_STDOUT_BYTES:
        stdout += CUT_MARK
    status, line = ProgramStatus.OK, _last_line(texts[stderr_read])
    if is_timeout or (os.WIFSIGNALED(wait_status) and os.WTERMSIG(wait_status) == signal.SIGXCPU):
        status, line = ProgramStatus.TIMEOUT, f"killed after {timeout_s:g} s"
    elif os.WIFSIGNALED(wait_status):
        status, line = ProgramStatus.ERROR, f"killed by {signal.Signals(os.WTERMSIG(wait_status)).name}"
    elif (exit_status := os.waitstatus_to_exitcode(wait_status)) != 0:
        status, line = ProgramStatus.ERROR, line or f"exit status {exit_status}"
    return {"status": status, "stdout": stdout, "stderr_line": line, "service_s": time.monotonic() - start_s}


def _read_until_exit(pid: int, texts: dict[int, bytearray], deadline_s: float) -> int | None:
    """Collects both pipes while the program lives; its wait status, or None when the deadline came first."""
    is_open = set(texts)
    while (left_s := deadline_s - time.monotonic()) > 0:
        # The pipes close a moment before the program is gone; something else may hold them open after it. So poll.
        if _read_ready(is_open, texts, min(left_s, 0.02 if is_open else 0.001)) and is_open:
            continue
        ended_pid, wait_status = os.waitpid(pid, os.WNOHANG)
        if ended_pid:
            while _read_ready(is_open, texts, 0.0) and time.monotonic() < deadline_s:  # what came after the last look
                pass
            return wait_status
    return None


def _read_ready(is_open: set[int], texts: dict[int, bytearray], wait_s: float) -> bool:
    """Reads one chunk from each pipe that has one, and drops closed pipes from `is_open`; whether any was ready."""
    readable, _, _ = select.select(list(is_open), [], [], wait_s)
    for descriptor in readable:
        chunk = os.read(descriptor, 65_536)
        if not chunk:
            is_open.discard(descriptor)
        _keep(texts, descriptor, chunk)
    return bool(readable)


def _keep(texts: dict[int, bytearray], descriptor: int, chunk: bytes) -> None:
    """Keeps the head of stdout and the tail of stderr; the rest is read and dropped, so that the program goes on."""
    text = texts[descriptor]
    text += chunk
    if descriptor == next(iter(texts)):  # stdout comes first
        del text[MAX_STDOUT_BYTES + 1 :]  # one byte over the limit says that it was cut
    else:
        del text[:-MAX_STDERR_BYTES]


def _kill_group(pid: int) -> None:
    try:
        os.killpg(pid, signal.SIGKILL)
    except ProcessLookupError:  # nobody left in the group
        pass


def _last_line(text: bytearray) -> str:
    lines = text.decode(errors="replace").split("\n")
    return next((line.strip()[:MAX_LINE_CHARS] for line in reversed(lines) if line.strip()), "")


def _run_here(program: str, timeout_s: float, memory_bytes: int, stdout: int, stderr: int) -> None:
    """Turns this fork into the program: its own session and pipes, nothing inherited, limits, hook, then `exec`."""
    os.setsid()
    nothing = os.open(os.devnull, os.O_RDONLY)
    for descriptor, place in ((nothing, 0), (stdout, 1), (stderr, 2)):
        os.dup2(descriptor, place)
    os.closerange(3, 256)
    sys.stdin, sys.stdout, sys.stderr = (open(place, "r" if place == 0 else "w") for place in range(3))
    for file in (sys.stdout, sys.stderr):
        file.reconfigure(line_buffering=True)  # what a program printed before it was killed still counts
    sys.argv = ["program"]

    cpu_s = math.ceil(timeout_s) + 1  # backs up the wall clock, for a program that outlives its runner
    for name, limit in (
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_NOFILE, 32),
        (resource.RLIMIT_CPU, cpu_s),
        (resource.RLIMIT_AS, memory_bytes),
        (resource.RLIMIT_NPROC, 1),  # counts all of this user's processes, so that any further fork is refused
    ):
        resource.setrlimit(name, (limit, limit))

    main = types.ModuleType("__main__")
    sys.modules["__main__"] = main
    code = compile(program, "<program>", "exec", dont_inherit=True)
    sys.addaudithook(_refuse)
    files = (sys.stdout, sys.stderr)  # a program may put others in their place
    exec(code, main.__dict__)
    if threading.active_count() == 1:  # else the ordinary way out, three times slower, waits for the threads
        for file in files:
            if not file.closed:
                file.flush()
        os._exit(0)


def _refuse(event: str, arguments: tuple[object, ...]) -> None:
    """The audit hook of a program: raises PermissionError for what a program may not do."""
    is_write = event == "open" and bool(arguments[2] & _WRITE_FLAGS)
    is_signal_to_others = event == "os.kill" and arguments[0] != os.getpid()
    if is_write or is_signal_to_others or event in _REFUSED_EVENTS or event.startswith("socket."):
        raise PermissionError(f"{event} is refused in the sandbox")


def _read_all(connection: socket.socket) -> bytes:
    chunks = []
    while chunk := connection.recv(65_536):
        chunks.append(chunk)
    return b"".join(chunks)


if __name__ == "__main__":
    for module in WARM_MODULES:
        importlib.import_module(module)
    gc.freeze()  # spares every fork's last collection the walk over what it shares with the server
    _serve()
