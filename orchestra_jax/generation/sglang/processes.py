"""SGLang servers as processes of this machine: started, waited for, and started again when they die or hang.

A server starts with the newest whole weights of the trainer's directory, under their version, or with random ones as
long as there are none; the engine verifies it, and sends it what it lacks, before it asks. The interpreter is one of
the servers' own environment.
"""

from __future__ import annotations

import dataclasses
import http.client
import json
import logging
import os
import pathlib
import signal
import subprocess
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Sequence

from orchestra_jax.generation.sglang.weight_directory import pin_whole_version, unpin
from orchestra_jax.generation.sglang_engine import SGLangConfig

SERVE_CPU = pathlib.Path(__file__).parents[2] / "assets" / "sglang_cpu" / "serve.sh"
DEVICES = ("cuda", "cpu")
CONTEXT_MARGIN = 16  # tokens that SGLang keeps of the context for itself
CHECK_EVERY_S = 10.0
ANSWER_TIMEOUT_S = 5.0
MAX_MISSED_CHECKS = 6
LONGEST_WAIT_S = 60.0

_logger = logging.getLogger(__name__)


@dataclasses.dataclass
class ServingConfig:
    """How the servers of `sglang.urls` are started; read by experiments/serve_policy.py."""

    device: str = "cuda"
    tensor_parallel: int = 1  # devices of each server, taken in order
    memory_fraction: float = 0.8  # of a device's memory, for weights and caches
    max_running: int = 256  # requests that a server samples at once
    start_timeout_s: float = 1800.0
    log_directory: str = "runs/serving"
    flags: tuple[str, ...] = ()  # more of SGLang's own


def server_command(
    python: str, config: SGLangConfig, serving: ServingConfig, url: str, model_directory: pathlib.Path, version: str
) -> list[str]:
    """The command line of one server. `version` "": random weights. ValueError for an unknown device or a bad URL."""
    if serving.device not in DEVICES:
        raise ValueError(f"serving.device {serving.device!r} is not one of {DEVICES}")
    host, port = _address(url)
    flags = {
        "--model-path": model_directory,
        "--load-format": "safetensors" if version else "dummy",
        "--weight-version": version or "none",
        "--host": host,
        "--port": port,
        "--dtype": config.dtype,
        "--context-length": config.context_length + CONTEXT_MARGIN,
        "--max-running-requests": serving.max_running,
        "--mem-fraction-static": serving.memory_fraction,
        "--tensor-parallel-size": serving.tensor_parallel,
    }
    if serving.device == "cpu":  # else it would take its share of the whole memory
        flags["--max-total-tokens"] = serving.max_running * (config.context_length + CONTEXT_MARGIN)
    start = ["bash", SERVE_CPU, python] if serving.device == "cpu" else [python, "-m", "sglang.launch_server"]
    switches = ["--skip-tokenizer-init", "--incremental-streaming-output"]
    switches += ["--enable-memory-saver"] if config.is_colocated else []
    pairs = [part for pair in flags.items() for part in pair]
    return [str(part) for part in [*start, *pairs, *switches, *serving.flags]]


def _address(url: str) -> tuple[str, int]:
    parts = urllib.parse.urlsplit(url)
    if parts.scheme != "http" or not parts.hostname or not parts.port:
        raise ValueError(f"{url!r} is no address of a server: write it as http://127.0.0.1:30000")
    return parts.hostname, parts.port


class ServerProcess:
    """One server and its log. Call `tend` again and again."""

    def __init__(self, python: str, config: SGLangConfig, serving: ServingConfig, url: str, number: int):
        """number: of the server on this machine, which says what devices are its own."""
        self.url, self._python, self._config, self._serving, self._number = url, python, config, serving, number
        self._root = pathlib.Path(config.weights_directory).absolute()
        self._log = pathlib.Path(serving.log_directory) / f"server_{_address(url)[1]}.log"
        self._process: subprocess.Popen | None = None
        self._pinned: tuple[pathlib.Path, int] | None = None
        self.is_ready = False
        self._num_failures = self._num_missed = 0
        self._started_s = self._next_s = 0.0

    def tend(self) -> None:
        """Starts the server if it is not there, and ends it if it does not answer."""
        now_s = time.monotonic()
        has_died = self._process is not None and self._process.poll() is not None
        if now_s < self._next_s and not has_died:
            return
        if self._process is None:
            self._start()
        elif has_died:
            self._give_up(f"has ended with {self._process.returncode}")
        elif self._answers():
            if not self.is_ready:
                _logger.warning("%s is ready after %.0f s", self.url, now_s - self._started_s)
                self._let_go()
            self.is_ready, self._num_failures, self._num_missed = True, 0, 0
            self._next_s = now_s + CHECK_EVERY_S
        elif self.is_ready:
            self._num_missed += 1
            self._next_s = now_s + CHECK_EVERY_S
            if self._num_missed == MAX_MISSED_CHECKS:
                self._give_up("no longer answers")
        elif now_s - self._started_s > self._serving.start_timeout_s:
            self._give_up(f"is not ready after {self._serving.start_timeout_s} s")

    def stop(self) -> None:
        """Ends the server and what it has started."""
        if self._process is None:
            return
        try:
            os.killpg(self._process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        self._process.wait()
        self._process, self.is_ready = None, False
        self._let_go()

    def _let_go(self) -> None:
        """Of the files that the server has started from: they would fill the memory that newer versions need."""
        if self._pinned is not None:
            unpin(self._pinned[0])

    def _start(self) -> None:
        self._pinned = pin_whole_version(self._root, str(_address(self.url)[1]))
        directory, version = (self._root / "model", "") if self._pinned is None else self._pinned
        command = server_command(self._python, self._config, self._serving, self.url, directory, str(version))
        self._log.parent.mkdir(parents=True, exist_ok=True)
        with open(self._log, "ab") as log:
            self._process = subprocess.Popen(
                command, stdout=log, stderr=subprocess.STDOUT, start_new_session=True, env=self._environment()
            )
        self._started_s = time.monotonic()
        told = f"version {version}" if version != "" else "random weights"
        _logger.warning("%s starts with %s as process %d; its log is %s", self.url, told, self._process.pid, self._log)

    def _environment(self) -> dict[str, str]:
        if self._serving.device == "cpu":
            return dict(os.environ)
        size = self._serving.tensor_parallel
        own = range(self._number * size, (self._number + 1) * size)
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
        devices = visible.split(",") if visible else [str(device) for device in range(own.stop)]
        if len(devices) < own.stop:
            raise ValueError(f"{self.url} needs devices {[*own]} of this machine and there are {devices}")
        return {**os.environ, "CUDA_VISIBLE_DEVICES": ",".join(devices[device] for device in own)}

    def _answers(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.url}/model_info", timeout=ANSWER_TIMEOUT_S) as reply:
                return "weight_version" in json.loads(reply.read())
        except (OSError, ValueError, http.client.HTTPException):  # the last: whoever answers speaks no HTTP
            return False

    def _give_up(self, told: str) -> None:
        self.stop()
        wait_s = min(LONGEST_WAIT_S, 2.0**self._num_failures)
        self._num_failures += 1
        self._num_missed, self._next_s = 0, time.monotonic() + wait_s
        _logger.warning("%s %s and is started again in %.0f s; its log is %s", self.url, told, wait_s, self._log)


def watch(servers: Sequence[ServerProcess], should_stop: Callable[[], bool], poll_s: float = 0.5) -> None:
    """Tends the servers until it should stop; none is left behind, whatever happens."""
    try:
        while not should_stop():
            for server in servers:
                server.tend()
            time.sleep(poll_s)
    finally:
        for server in servers:
            server.stop()


def prepare_model_directory(config: SGLangConfig, fields: dict[str, object]) -> None:
    """Puts `fields` as config.json where a server finds it that starts before there are weights."""
    directory = pathlib.Path(config.weights_directory) / "model"
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")
