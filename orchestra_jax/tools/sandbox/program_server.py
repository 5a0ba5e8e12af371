"""The sandbox's server: run as a script by python_sandbox.py, never imported by the package. Standard library alone.

One file descriptor arrives on stdin's socket for each program; a forked runner reads the request from it, runs the
program in a fork of its own, and writes the result back. The program's limits are set in the last fork: resource
limits, the filter of system calls where there is one, the audit hook.
"""

from __future__ import annotations

import _posixsubprocess
import ctypes
import gc
import importlib
import json
import math
import os
import resource
import select
import signal
import socket
import sys
import threading
import time
import types

MAX_STDOUT_BYTES = 16_384
CUT_MARK = "\n[output cut]"
MAX_STDERR_BYTES = 65_536  # a traceback's last line is its message, so the end is what is kept
MAX_LINE_CHARS = 300

# Loaded before the fork, so that no program pays for them; traceback for the interpreter's own report.
WARM_MODULES = "collections datetime decimal fractions functools itertools math random re statistics traceback".split()

_PR_SET_PDEATHSIG, _PR_SET_SECCOMP, _PR_SET_NO_NEW_PRIVS, _SECCOMP_MODE_FILTER = 1, 22, 38, 2
_BPF_INSTRUCTION_BYTES = 8

_WRITE_FLAGS = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
_REFUSED_EVENTS = frozenset(
    "os.fork os.forkpty os.posix_spawn os.exec os.system os.spawn os.startfile subprocess.Popen pty.spawn "
    "os.killpg os.remove os.rename os.rmdir os.mkdir os.link os.symlink os.truncate "
    "os.chmod os.chown os.chflags os.utime os.setxattr os.removexattr resource.setrlimit resource.prlimit "
    "mmap.__new__ signal.pthread_kill".split()
)
_REFUSED_PREFIXES = ("socket.", "ctypes.", "syslog.", "shutil.", "tempfile.", "gc.", "spwd.")
_REFUSED_MODULES = frozenset(
    "_ctypes _testcapi _testinternalcapi _xxsubinterpreters _interpreters _multiprocessing readline".split()
)
_UNAUDITED = ("mkfifo", "mknod", "memfd_create", "pidfd_open", "setpriority", "sched_setaffinity", "lockf", "setsid")
_READABLE = ("/usr/share/zoneinfo", "/dev/null", "/dev/zero", "/dev/urandom", "/etc/localtime")


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
            # The program inherits no object that owns a descriptor: from Python 3.13 on one that finds its descriptor
            # closed says so at the end, on stderr's last line.
            control.detach()
            with open(descriptors[0], "rb", closefd=False) as file:
                request = json.load(file)
            result = _supervise(**request)
            with open(descriptors[0], "w") as file:
                json.dump(result, file)
            os._exit(0)
        os.close(descriptors[0])


def _supervise(program: str, timeout_s: float, memory_bytes: int, syscall_filter: str) -> dict[str, object]:
    """The runner: forks the program, reads its pipes up to the deadline, kills its process group, reports."""
    stdout_read, stdout_write = os.pipe()
    stderr_read, stderr_write = os.pipe()
    start_s = time.monotonic()
    pid = os.fork()
    if pid == 0:
        _run_here(program, timeout_s, memory_bytes, bytes.fromhex(syscall_filter), stdout_write, stderr_write)
        sys.exit(0)  # an exception leaves through the top of the script: traceback on stderr, status 1
    os.close(stdout_write)
    os.close(stderr_write)

    texts = {stdout_read: bytearray(), stderr_read: bytearray()}
    wait_status = _read_until_exit(pid, texts, start_s + timeout_s)
    is_timeout = wait_status is None
    _kill(pid, is_timeout)
    if is_timeout:
        _, wait_status = os.waitpid(pid, 0)

    stdout = texts[stdout_read][:MAX_STDOUT_BYTES].decode(errors="replace")
    if len(texts[stdout_read]) > MAX_STDOUT_BYTES:
        stdout += CUT_MARK
    status, line = "ok", _last_line(texts[stderr_read])
    if is_timeout or (os.WIFSIGNALED(wait_status) and os.WTERMSIG(wait_status) == signal.SIGXCPU):
        status, line = "timeout", f"killed after {timeout_s:g} s"
    elif os.WIFSIGNALED(wait_status):
        status, line = "error", f"killed by {signal.Signals(os.WTERMSIG(wait_status)).name}"
    elif (exit_status := os.waitstatus_to_exitcode(wait_status)) != 0:
        status, line = "error", line or f"exit status {exit_status}"
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


def _kill(pid: int, is_running: bool) -> None:
    """The program and all that is left in its process group."""
    try:
        os.killpg(pid, signal.SIGKILL)
    except ProcessLookupError:  # nobody left in the group
        pass
    if is_running:  # it may have left its group
        os.kill(pid, signal.SIGKILL)


def _last_line(text: bytearray) -> str:
    lines = text.decode(errors="replace").split("\n")
    return next((line.strip()[:MAX_LINE_CHARS] for line in reversed(lines) if line.strip()), "")


def _run_here(
    program: str, timeout_s: float, memory_bytes: int, syscall_filter: bytes, stdout: int, stderr: int
) -> None:
    """Turns this fork into the program: its own session and pipes, nothing inherited, limits, hook, filter, `exec`."""
    os.setsid()
    nothing = os.open(os.devnull, os.O_RDONLY)
    for descriptor, place in ((nothing, 0), (stdout, 1), (stderr, 2)):
        os.dup2(descriptor, place)
    os.closerange(3, 256)
    sys.stdin, sys.stdout, sys.stderr = (open(place, "r" if place == 0 else "w") for place in range(3))
    for file in (sys.stdout, sys.stderr):
        file.reconfigure(line_buffering=True)  # what a program printed before it was killed still counts
    sys.argv = ["program"]
    _set_limits(timeout_s, memory_bytes)
    main = types.ModuleType("__main__")
    sys.modules["__main__"] = main
    files = (sys.stdout, sys.stderr)  # a program may put others in their place
    if sys.platform == "linux":
        _enter_kernel_limits(syscall_filter)
    for name in ("ctypes", "_ctypes"):  # what would reach round the hook
        sys.modules.pop(name, None)
        globals().pop(name, None)
    _posixsubprocess.fork_exec = _refuse_process
    for name in _UNAUDITED:  # what the hook does not hear of
        for module in (os, sys.modules[os.name]):
            vars(module).pop(name, None)
    readable = (*_READABLE, os.path.dirname(os.path.realpath(os.__file__)))
    sys.addaudithook(lambda event, arguments: _refuse(event, arguments, readable))
    exec(compile(program, "<program>", "exec", dont_inherit=True), main.__dict__)
    if threading.active_count() == 1:  # else the ordinary way out, three times slower, waits for the threads
        for file in files:
            if not file.closed:
                file.flush()
        os._exit(0)


def _set_limits(timeout_s: float, memory_bytes: int) -> None:
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


def _enter_kernel_limits(syscall_filter: bytes) -> None:
    """Dies with its runner; and hands the filter to the kernel, which holds it for the rest of this process."""
    prctl = ctypes.CDLL(None, use_errno=True).prctl
    prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if not syscall_filter:
        return
    instructions = ctypes.create_string_buffer(syscall_filter, len(syscall_filter))
    # struct sock_fprog: the number of instructions, padded to a pointer's size, and their address.
    length = len(syscall_filter) // _BPF_INSTRUCTION_BYTES
    program = (ctypes.c_size_t * 2)(length, ctypes.addressof(instructions))
    prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    if prctl(_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, ctypes.byref(program), 0, 0) != 0:
        raise SystemExit("the filter of system calls was not accepted")


def _refuse_process(*arguments: object) -> None:
    raise PermissionError("a process is refused in the sandbox")


def _refuse(event: str, arguments: tuple[object, ...], readable: tuple[str, ...]) -> None:
    """The audit hook of a program: raises PermissionError for what a program may not do."""
    is_refused = event in _REFUSED_EVENTS or event.startswith(_REFUSED_PREFIXES)
    if event == "open":
        is_refused = bool(arguments[2] & _WRITE_FLAGS) or not _is_readable(arguments[0], readable)
    elif event in ("os.listdir", "os.scandir", "glob.glob"):
        is_refused = not _is_readable(arguments[0], readable)
    elif event == "sqlite3.connect":
        is_refused = arguments[0] != ":memory:"
    elif event == "os.kill":
        is_refused = arguments[0] != os.getpid()
    elif event == "import":
        is_refused = arguments[0] in _REFUSED_MODULES
    if is_refused:
        raise PermissionError(f"{event} is refused in the sandbox")


def _is_readable(path: object, readable: tuple[str, ...]) -> bool:
    """Whether a path lies under one that any program may read; an open descriptor always may be."""
    if isinstance(path, int):
        return True
    real = os.path.realpath(os.fsdecode(path if path is not None else "."))
    return any(real == place or real.startswith(place + os.sep) for place in readable)


if __name__ == "__main__":
    for module in WARM_MODULES:
        importlib.import_module(module)
    gc.freeze()  # spares every fork's last collection the walk over what it shares with the server
    _serve()
