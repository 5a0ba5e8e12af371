"""Hostile programs under the levels of isolation that this machine gives: none reaches outside, all end in time.

The strongest level runs by default, the others with the slow tests.
"""

import http.server
import os
import pathlib
import threading
import time

import hostile_programs
import pytest

from orchestra_jax.tools.sandbox.isolation import LEVELS, isolate, missing
from orchestra_jax.tools.sandbox.python_sandbox import PythonSandbox

TIMEOUT_S = 0.4
SECRET = "the-secret-of-the-host"
ENVIRONMENT = b"PYTHONHASHSEED=0\x00"


STRONGEST = next(level for level in reversed(LEVELS) if not missing(level))
WEAKER = [pytest.param(level, marks=pytest.mark.slow) for level in LEVELS if level != STRONGEST]


@pytest.fixture(scope="module", params=[STRONGEST, *WEAKER])
def sandbox(request):
    if reason := missing(request.param):
        pytest.skip(reason)
    with PythonSandbox(timeout_s=TIMEOUT_S, memory_bytes=128 * 2**20, isolation=request.param) as made:
        made.run("")  # starts the server, so that no test waits for it
        yield made


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """A secret of the host, a place to write to, and a server that counts who came."""
    folder = tmp_path_factory.mktemp("outside")
    (folder / "secret").write_text(SECRET)
    folder.chmod(0o777)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), http.server.SimpleHTTPRequestHandler)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    yield {
        "SECRET": str(folder / "secret"),
        "TARGET": str(folder / "target"),
        "FOLDER": str(folder),
        "PID": str(os.getpid()),
        "PORT": str(server.server_port),
    }
    server.shutdown()
    server.server_close()


def filled(program, places):
    for name, value in places.items():
        program = program.replace(f"@{name}@", value)
    return program


@pytest.mark.parametrize("name", hostile_programs.PROGRAMS)
def test_no_program_gets_out_and_all_end_in_time(sandbox, places, name):
    program = filled(hostile_programs.PROGRAMS[name], places)
    start_s = time.monotonic()
    result = sandbox.run(program)
    assert time.monotonic() - start_s < TIMEOUT_S + 1.0
    assert "ESCAPED" not in result.stdout.replace("ESCAPED2", "") and SECRET not in result.stdout + result.stderr_line
    assert len(result.stdout) < 20_000 and len(result.stderr_line) <= 300
    assert sorted(os.listdir(places["FOLDER"])) == ["secret"]
    assert pathlib.Path(places["SECRET"]).read_text() == SECRET


def test_afterwards_the_sandbox_works_and_no_process_is_left(sandbox):
    """Runs behind the others of its level: the fixture is the module's."""
    assert sandbox.run("print(1 + 1)").stdout == "2\n"
    pid = sandbox._server.pid
    deadline_s = time.monotonic() + 2
    while (left := programs_below(pid)) and time.monotonic() < deadline_s:
        time.sleep(0.02)  # the kernel takes a moment to reap
    assert not left
    sandbox.close()
    assert not pathlib.Path(f"/proc/{pid}").exists()
    while orphans() and time.monotonic() < deadline_s:
        time.sleep(0.02)  # a sandbox of another process may be between a kill and its reaping
    assert not orphans()


def programs_below(server_pid):
    """Runners and programs: whatever descends from the server, but for the chain that bwrap itself makes."""
    parents = {pid: int(stat(pid)[1]) for pid in pids() if stat(pid)}
    below = {server_pid}
    while more := {pid for pid, parent in parents.items() if parent in below and pid not in below}:
        below |= more
    num_children = {pid: sum(parent == pid for parent in parents.values()) for pid in below}
    chain = set()
    last = server_pid
    while True:
        chain.add(last)
        children = [pid for pid in below if parents[pid] == last]
        if len(children) != 1 or num_children[last] != 1 or b"program_server" not in command(children[0]):
            break
        last = children[0]
    is_bubblewrap = b"bwrap" in command(server_pid)
    return below - chain if is_bubblewrap else below - {server_pid}


def orphans():
    """Processes with the sandbox's environment that nobody owns any more."""
    found = []
    for pid in pids():
        try:
            environment = pathlib.Path(f"/proc/{pid}/environ").read_bytes()
        except OSError:
            continue
        fields = stat(pid)
        if environment == ENVIRONMENT and fields and fields[1] == "1" and fields[0] != "Z":
            found.append(pid)
    return found


def pids():
    return [int(name) for name in os.listdir("/proc") if name.isdigit()]


def stat(pid):
    """State, parent and what follows them; None for a process that is gone."""
    try:
        return pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None


def command(pid):
    try:
        return pathlib.Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


def test_a_level_that_is_required_and_not_there_is_refused(monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    missing.cache_clear()
    try:
        with pytest.raises(ValueError, match="cannot give the isolation 'bubblewrap': "):
            PythonSandbox(isolation="bubblewrap")
        assert isolate("strongest", __file__).level in ("limits", "seccomp")
    finally:
        missing.cache_clear()
    with pytest.raises(ValueError, match=r"isolation 'docker' is not one of \('strongest', 'limits'"):
        PythonSandbox(isolation="docker")
