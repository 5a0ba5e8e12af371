"""Servers as processes: their command lines, and that a dead or a hanging one is started again with the newest weights.

The process is a real one; what it serves is /model_info alone. With SGLang itself: test_real_server.py.
"""

import json
import os
import pathlib
import signal
import socket
import sys
import threading
import time
import urllib.request

import pytest

from orchestra_jax.generation.sglang import processes
from orchestra_jax.generation.sglang.processes import (
    SERVE_CPU,
    ServerProcess,
    ServingConfig,
    prepare_model_directory,
    server_command,
    watch,
)
from orchestra_jax.generation.sglang.weight_directory import write_version
from orchestra_jax.generation.sglang_engine import SGLangConfig
from tests.ports import free_port

URL = "http://10.0.0.1:30001"
PROGRAM = f"""#!{sys.executable}
import http.server, json, pathlib, signal, sys, time
flags = dict(zip(sys.argv, sys.argv[1:]))
hanging = pathlib.Path(__file__).with_name("hanging")

class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        while hanging.exists():
            time.sleep(0.05)
        body = json.dumps({{"weight_version": flags["--weight-version"], "model": flags["--model-path"]}}).encode()
        self.send_response(200)
        self.end_headers()
        self.wfile.write(body)

http.server.HTTPServer.allow_reuse_address = True
http.server.HTTPServer(("127.0.0.1", int(flags["--port"])), Handler).serve_forever()
"""


def test_the_command_of_a_server_says_all_that_the_config_does(tmp_path):
    config = SGLangConfig(urls=(URL,), dtype="bfloat16", context_length=2_000)
    serving = ServingConfig(
        tensor_parallel=2, memory_fraction=0.5, max_running=64, flags=("--chunked-prefill-size", "8")
    )
    command = server_command("/venv/python", config, serving, URL, tmp_path / "v000012", "12")
    flags = dict(zip(command, command[1:], strict=False))
    assert command[:3] == ["/venv/python", "-m", "sglang.launch_server"]
    assert flags["--model-path"] == str(tmp_path / "v000012") and flags["--load-format"] == "safetensors"
    assert (flags["--host"], flags["--port"], flags["--weight-version"]) == ("10.0.0.1", "30001", "12")
    assert (flags["--dtype"], flags["--context-length"], flags["--tensor-parallel-size"]) == ("bfloat16", "2016", "2")
    assert flags["--mem-fraction-static"] == "0.5" and flags["--chunked-prefill-size"] == "8"
    assert "--enable-memory-saver" not in command and "--max-total-tokens" not in command
    config.is_colocated, serving.device = True, "cpu"
    command = server_command("/venv/python", config, serving, URL, tmp_path, "")
    flags = dict(zip(command, command[1:], strict=False))
    assert command[:3] == ["bash", str(SERVE_CPU), "/venv/python"] and "--enable-memory-saver" in command
    assert flags["--load-format"] == "dummy" and flags["--max-total-tokens"] == str(64 * 2016)


@pytest.mark.parametrize(
    ("url", "device", "told"),
    [
        ("127.0.0.1:30000", "cuda", "'127.0.0.1:30000' is no address of a server"),
        ("http://127.0.0.1", "cuda", "is no address of a server: write it as http://127.0.0.1:30000"),
        (URL, "tpu", "serving.device 'tpu' is not one of"),
    ],
)
def test_a_server_that_cannot_be_started_is_refused(tmp_path, url, device, told):
    with pytest.raises(ValueError, match=told):
        server_command("python", SGLangConfig(), ServingConfig(device=device), url, tmp_path, "")


def test_each_server_has_devices_of_its_own(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6,7")
    serving = ServingConfig(tensor_parallel=2)
    second = ServerProcess("python", SGLangConfig(), serving, URL, 1)
    assert second._environment()["CUDA_VISIBLE_DEVICES"] == "6,7"
    with pytest.raises(ValueError, match=r"needs devices \[4, 5\] of this machine"):
        ServerProcess("python", SGLangConfig(), serving, URL, 2)._environment()


def test_what_speaks_no_http_is_no_server():
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def answer():
            connection, _ = listener.accept()
            with connection:
                connection.recv(1_000)
                connection.sendall(b"GET /model_info\r\n")

        answering = threading.Thread(target=answer)
        answering.start()
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        assert not ServerProcess("python", SGLangConfig(), ServingConfig(), url, 0)._answers()
        answering.join()


def about(url):
    try:
        with urllib.request.urlopen(f"{url}/model_info", timeout=0.5) as reply:
            return json.loads(reply.read())
    except (OSError, ValueError):
        return {}


def wait_for(condition):
    end_s = time.monotonic() + 120
    while not (value := condition()):
        assert time.monotonic() < end_s
        time.sleep(0.05)
    return value


@pytest.mark.slow
def test_a_killed_and_a_hanging_server_start_again_with_the_newest_weights(tmp_path, monkeypatch):
    monkeypatch.setattr(processes, "CHECK_EVERY_S", 0.1)
    monkeypatch.setattr(processes, "MAX_MISSED_CHECKS", 2)
    monkeypatch.setattr(processes, "ANSWER_TIMEOUT_S", 0.5)
    program = tmp_path / "python"
    program.write_text(PROGRAM)
    program.chmod(0o755)
    url = f"http://127.0.0.1:{free_port()}"
    root = tmp_path / "weights"
    config = SGLangConfig(urls=(url,), weights_directory=str(root))
    prepare_model_directory(config, {"model_type": "qwen3"})
    server = ServerProcess(str(program), config, ServingConfig(log_directory=str(tmp_path)), url, 0)
    stop = threading.Event()
    watcher = threading.Thread(target=watch, args=([server], stop.is_set, 0.05))
    watcher.start()
    try:
        assert wait_for(lambda: about(url)) == {"weight_version": "none", "model": str(root / "model")}
        wait_for(lambda: server.is_ready)
        write_version(root, 12, lambda directory: bool((directory / "model.safetensors").write_text("w")))
        first = server._process.pid
        os.kill(first, signal.SIGKILL)
        wait_for(lambda: about(url).get("weight_version") == "12")
        wait_for(lambda: server.is_ready and not list(root.glob(".start-*")))
        second = server._process.pid
        (tmp_path / "hanging").touch()
        wait_for(lambda: server._process is None or server._process.pid != second)
        (tmp_path / "hanging").unlink()
        wait_for(lambda: about(url))
    finally:
        stop.set()
        watcher.join()
    assert not about(url)  # none is left behind
    assert (pathlib.Path(tmp_path) / f"server_{url.rsplit(':', 1)[1]}.log").exists()
