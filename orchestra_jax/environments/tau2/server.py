"""A tau2 domain in a process of its own, asked one thing at a time: the other end of worker.py."""

from __future__ import annotations

import json
import os
import pathlib
import subprocess

from orchestra_jax.environments.tau2.source import command_line

ROOT = pathlib.Path(__file__).parents[3]


class Tau2Server:
    """The domain of the package or of a checkout (source.load_domain), in that interpreter. Close it in the end.

    ValueError if the interpreter cannot serve it: without what the tools' code needs, or with other data than pinned.
    """

    def __init__(self, domain: str, server_python: str, checkout: str = "", is_any_version: bool = False):
        told = command_line(domain, checkout, is_any_version)
        command = [server_python, "-m", "orchestra_jax.environments.tau2.worker", *told]
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
        if self._process.stdin.closed:
            raise RuntimeError("the tau2 worker was closed")
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
