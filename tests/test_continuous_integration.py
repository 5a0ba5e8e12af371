"""The last part of .ci/run: an environment that cannot be built skips it in so many words, a failing test does not."""

import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]


def run(directory, **variables):
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("SGLANG_", "CI_", "PIP_"))}
    environment["PATH"] = f"{pathlib.Path(sys.executable).parent}:{environment['PATH']}"
    environment["XDG_CACHE_HOME"] = str(directory / "cache")
    return subprocess.run(
        [ROOT / ".ci" / "sglang_tests"], env={**environment, **variables}, capture_output=True, text=True, timeout=300
    )


def skipped(result):
    assert result.returncode == 0, result.stderr
    (line,) = result.stdout.splitlines()
    prefix = "SKIPPED: the tests against real SGLang servers: "
    assert line.startswith(prefix)
    return line.removeprefix(prefix)


def test_they_can_be_left_out(tmp_path):
    assert skipped(run(tmp_path, CI_SGLANG="0")) == "CI_SGLANG is 0"
    assert not (tmp_path / "cache").exists()


def test_an_environment_that_cannot_be_built_is_told_with_its_reason(tmp_path):
    (tmp_path / "cache").write_text("a file where the environment would go")
    told = skipped(run(tmp_path, PYTHON=sys.executable))
    assert told.startswith("their environment cannot be built (exit code 1): ") and "Not a directory" in told


def test_a_build_that_takes_too_long_is_told(tmp_path):
    slow = tmp_path / "python"
    slow.write_text("#!/usr/bin/env bash\nsleep 60\n")
    slow.chmod(0o755)
    told = skipped(run(tmp_path, PYTHON=str(slow), CI_SGLANG_LIMIT_S="1"))
    assert told == "their environment was not built within 1 s"


@pytest.mark.slow
def test_failing_tests_fail_it(tmp_path):
    result = run(tmp_path, SGLANG_PYTHON=str(tmp_path / "nothing"))
    assert result.returncode == 1 and "names no interpreter" in result.stdout


@pytest.mark.slow
def test_tests_that_take_too_long_fail_it(tmp_path):
    """Importing the tests alone takes longer."""
    assert run(tmp_path, SGLANG_PYTHON=sys.executable, CI_SGLANG_LIMIT_S="1").returncode == 124
