"""A tau2 domain in a process of its own, asked one thing at a time: the other end of worker.py."""

from __future__ import annotations

import json
import os
import pathlib
import subprocess

ROOT = pathlib.Path(__file__).parents[3]


class Tau2Server:
    """ValueError if the interpreter has no inspect-evals, or other data than the pinned. Close it in the end."""

    def __init__(self, domain: str, server_python: str):
        command = [server_python, "-m", "orchestra_jax.environments.tau2.worker", domain]
        try:
            self._process = subprocess.Popen(
                command,
                env={**os.environ, "PYTHONPATH": str(ROOT)},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
            )
        except OSError as error:
            raise ValueError(f"the interpreter {server_python!r} of tau2's {domain} cannot be run: {error}") from error
        try:
            self._read()
        except RuntimeError as error:
            self.close()
            raise ValueError(f"{server_python} does not serve tau2's {domain}: {error}") from error

    def ask(self, **request: object) -> dict:
        """RuntimeError for what the worker refuses, and for one that has died."""
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError as error:
            raise RuntimeError("the tau2 worker has ended") from error
        return self._read()

    def _read(self) -> dict:
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError("the tau2 worker has ended")
        answer = json.loads(line)
        if "error" in answer:
            raise RuntimeError(answer["error"])
        return answer

    def close(self) -> None:
        self._process.stdin.close()
        self._process.stdout.close()
        self._process.wait()
