import concurrent.futures
import os
import time

import pytest

from orchestra_jax.tools.sandbox.program_server import CUT_MARK, MAX_STDOUT_BYTES
from orchestra_jax.tools.sandbox.python_sandbox import ProgramStatus, PythonSandbox

TIMEOUT_S = 0.8


@pytest.fixture(scope="module")
def sandbox():
    with PythonSandbox(timeout_s=TIMEOUT_S, memory_bytes=128 * 2**20) as sandbox:
        sandbox.run("")  # starts the server, so that no test waits for it
        yield sandbox


def test_a_program_really_runs_elsewhere(sandbox):
    result = sandbox.run("import os\nprint(6 * 7, os.getpid())")
    printed, pid = result.stdout.split()
    assert (result.status, printed, result.stderr_line) == (ProgramStatus.OK, "42", "")
    assert int(pid) != os.getpid() and 0 < result.service_s < TIMEOUT_S


def test_it_runs_as_the_main_script_with_the_standard_library(sandbox):
    program = (
        "import dataclasses, math\n@dataclasses.dataclass\nclass Pair:\n    x: int\nif __name__ == '__main__':\n    "
    )
    assert sandbox.run(program + "print(Pair(math.gcd(12, 18)))").stdout == "Pair(x=6)\n"


@pytest.mark.parametrize(
    ("program", "line"),
    [
        ("print(totl)", "NameError: name 'totl' is not defined"),
        ("def f(:", "SyntaxError: invalid syntax"),
        ("raise SystemExit('no')", "no"),
        ("raise SystemExit(3)", "exit status 3"),
        ("import numpy", "ModuleNotFoundError: No module named 'numpy'"),
        ("input()", "EOFError: EOF when reading a line"),
    ],
)
def test_a_failure_is_one_line(sandbox, program, line):
    result = sandbox.run(program)
    assert (result.status, result.stderr_line) == (ProgramStatus.ERROR, line)


def test_output_before_a_failure_is_kept(sandbox):
    result = sandbox.run("print('half')\n1 / 0")
    assert (result.status, result.stdout) == (ProgramStatus.ERROR, "half\n")
    assert result.stderr_line == "ZeroDivisionError: division by zero"


@pytest.mark.parametrize(
    "program",
    [
        "print('so far')\nwhile True: pass",
        "print('so far')\nimport time\ntime.sleep(60)",
        "print('so far')\nimport signal\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\nwhile True: pass",
    ],
)
def test_the_wall_clock_ends_a_program(sandbox, program):
    start_s = time.monotonic()
    result = sandbox.run(program)
    assert (result.status, result.stdout) == (ProgramStatus.TIMEOUT, "so far\n")
    assert result.stderr_line == "killed after 0.8 s"
    assert TIMEOUT_S <= result.service_s < time.monotonic() - start_s < TIMEOUT_S + 1.0


def test_a_memory_bomb_is_refused(sandbox):
    result = sandbox.run("text = 'x' * (10 ** 9)\nprint(len(text))")
    assert (result.status, result.stdout, result.stderr_line) == (ProgramStatus.ERROR, "", "MemoryError")


def test_a_fork_bomb_is_refused(sandbox):
    program = (
        "import os\ntry:\n    for _ in range(9): os.fork()\nexcept OSError: print('refused')\nelse: print('forked')"
    )
    assert sandbox.run(program).stdout == "refused\n"


@pytest.mark.parametrize(
    "program",
    [
        "open('written.txt', 'w')",
        "import os\nos.remove('/nothing')",
        "import subprocess\nsubprocess.run(['true'])",
        "import os\nos.system('true')",
        "import socket\nsocket.socket()",
        "import os\nos.kill(os.getppid(), 9)",
        "import os\nos.killpg(0, 9)",
    ],
)
def test_what_a_program_may_not_do(sandbox, program):
    result = sandbox.run(program)
    assert result.status == ProgramStatus.ERROR and "is refused in the sandbox" in result.stderr_line


def test_huge_output_is_cut_and_the_program_goes_on(sandbox):
    result = sandbox.run("print('x' * 5_000_000)\nimport sys\nprint('last', file=sys.stderr)")
    assert result.stdout == "x" * MAX_STDOUT_BYTES + CUT_MARK
    assert (result.status, result.stderr_line) == (ProgramStatus.OK, "last")


def test_output_at_the_limit_is_not_cut(sandbox):
    assert sandbox.run(f"print('x' * {MAX_STDOUT_BYTES}, end='')").stdout == "x" * MAX_STDOUT_BYTES


@pytest.mark.parametrize(
    ("program", "status", "stdout"),
    [
        ("import os\nprint('a')\nos.kill(os.getpid(), 9)", ProgramStatus.ERROR, "a\n"),
        ("import sys\nprint('a')\nsys.stdout.close()", ProgramStatus.OK, "a\n"),
        ("import os, time\nprint('a')\nos.close(1)\nos.close(2)\ntime.sleep(0.1)", ProgramStatus.OK, "a\n"),
        ("import os\nprint('a')\nos._exit(0)", ProgramStatus.OK, "a\n"),
        ("print('a', end='')", ProgramStatus.OK, "a"),
    ],
)
def test_odd_ends_are_survived(sandbox, program, status, stdout):
    result = sandbox.run(program)
    assert (result.status, result.stdout) == (status, stdout)
    assert sandbox.run("print('still here')").stdout == "still here\n"


def test_threads_of_a_program_are_waited_for_where_the_kernel_grants_them(sandbox):
    program = "import threading, time\nthreading.Thread(target=lambda: (time.sleep(0.05), print('late'))).start()"
    result = sandbox.run(program)
    assert result.stdout == "late\n" or "can't start new thread" in result.stderr_line


def test_no_environment_and_no_files_are_inherited(sandbox, tmp_path, monkeypatch):
    monkeypatch.setenv("SECRET_KEY", "x")
    with open(tmp_path / "open.txt", "w") as file:
        os.set_inheritable(file.fileno(), True)
        with PythonSandbox(timeout_s=TIMEOUT_S) as fresh:
            program = (
                "import os\nprint('SECRET_KEY' in os.environ)\n"
                "for descriptor in range(3, 100):\n"
                "    try: os.fstat(descriptor)\n"
                "    except OSError: continue\n"
                "    print('open', descriptor)\n"
            )
            assert fresh.run(program).stdout == "False\n"


def test_a_second_call_is_not_run_again(sandbox):
    program = "import time\nprint(time.time_ns())"
    assert sandbox.run(program) is sandbox.run(program)
    assert sandbox.run(program).stdout != sandbox.run(program + " ").stdout


def test_sets_iterate_alike_in_every_server():
    program = "print({'alpha', 'beta', 'gamma', 'delta', 'epsilon', 'zeta'})"
    outputs = set()
    for _ in range(2):
        with PythonSandbox(timeout_s=TIMEOUT_S) as fresh:
            outputs.add(fresh.run(program).stdout)
    assert len(outputs) == 1


def test_threads_run_side_by_side(sandbox):
    def nap(index):
        return sandbox.run(f"import time\ntime.sleep(0.3)\nprint({index})").stdout

    start_s = time.monotonic()
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        assert list(pool.map(nap, range(4))) == ["0\n", "1\n", "2\n", "3\n"]
    assert time.monotonic() - start_s < 4 * 0.3


def test_a_killed_server_is_replaced(sandbox):
    sandbox._server.kill()
    assert sandbox.run("print('again')").stdout == "again\n"
    sandbox.close()
    assert sandbox.run("print('and again')").stdout == "and again\n"


def test_impossible_limits_are_named():
    with pytest.raises(ValueError, match="timeout_s must be positive, got 0"):
        PythonSandbox(timeout_s=0)
    with pytest.raises(ValueError, match="at least 64 MiB .* got 1024"):
        PythonSandbox(memory_bytes=1024)


def test_a_program_with_half_a_surrogate_pair_fails_and_is_remembered(sandbox):
    program = "print('\ud800')"
    assert sandbox.run(program).status == ProgramStatus.ERROR
    assert sandbox.remembered(program) == sandbox.run(program)
