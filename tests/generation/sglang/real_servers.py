"""Real SGLang 0.5.23 servers on CPU with a tiny random Qwen3, started by experiments/serve_policy.py."""

import asyncio
import contextlib
import dataclasses
import functools
import http.client
import json
import pathlib
import re
import signal
import subprocess
import sys
import time
import urllib.request

import jax
import jax.numpy as jnp
import numpy as np

from orchestra_jax.components import build_chat_and_model
from orchestra_jax.config import RunConfig
from orchestra_jax.generation.engine import Sampling
from orchestra_jax.generation.sglang_engine import SGLangEngine
from orchestra_jax.models.transformer import Transformer, head_weights
from orchestra_jax.models.weight_files import WeightWriter
from tests.ports import free_port

ROOT = pathlib.Path(__file__).parents[3]
START_S = 600.0  # of two tries; one is half a minute on a quiet machine
SHARPNESS = 3.0  # of the last norm: a random model is almost uniform without it


def ask(url, path, body=None, timeout_s=60.0):
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url + path, data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=timeout_s) as reply:
        return json.loads(reply.read())


def label(url):
    try:
        return ask(url, "/model_info", timeout_s=5.0)["weight_version"]
    except (OSError, ValueError, http.client.HTTPException):
        return None


def checksums(url):
    return ask(url, "/weights_checker", {"action": "checksum"})["ranks"][0]["checksums"]


def wait_for(condition, timeout_s, what):
    end_s = time.monotonic() + timeout_s
    while not (value := condition()):
        assert time.monotonic() < end_s, f"no {what} in {timeout_s} s"
        time.sleep(0.2)
    return value


class Served:
    """serve_policy in a process of its own."""

    def __init__(self, python, directory, num_servers, dtype):
        self.urls = tuple(f"http://127.0.0.1:{free_port()}" for _ in range(num_servers))
        self.directory = directory
        self.overrides = [
            f"--config.sglang.urls={self.urls}", f"--config.sglang.weights_directory={directory / 'weights'}",
            f"--config.sglang.dtype={dtype}", "--config.serving.device=cpu", "--config.serving.max_running=16",
            f"--config.serving.log_directory={directory}", "--config.serving.memory_fraction=0.2",
            f"--config.serving.start_timeout_s={START_S * 0.4}", "--config.engine=sglang",
        ]  # fmt: skip
        self.config = RunConfig()
        self.config.sglang.urls, self.config.sglang.dtype = self.urls, dtype
        self.config.sglang.weights_directory = str(directory / "weights")
        self.config.sglang.max_attempts = 40
        self.log = directory / "serve_policy.log"
        command = [
            sys.executable, "-m", "experiments.serve_policy", "--config=configs/smoke.py",
            f"--server_python={python}", *self.overrides,
        ]  # fmt: skip
        with open(self.log, "wb") as log:
            self.process = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log)

    def wait(self):
        with contextlib.ExitStack() as stack:
            stack.callback(self.close)
            for url in self.urls:
                wait_for(lambda url=url: label(url) or self.process.poll() is not None, START_S, f"server at {url}")
            assert self.process.poll() is None, self.log.read_text()
            stack.pop_all()
        return self

    def pid(self, url):
        """Of the server that was started last."""
        started = re.findall(rf"{url} starts with .* as process (\d+)", self.log.read_text())
        return int(started[-1])

    def num_generated(self, url):
        """Requests of /generate that the server has answered, under whatever process."""
        log = self.directory / f"server_{url.rpartition(':')[2]}.log"
        return log.read_text(errors="replace").count('"POST /generate HTTP')

    def engine(self, **settings):
        model_config = served_model_config(self.config)
        config = dataclasses.replace(self.config.sglang, **settings)
        return SGLangEngine(config, model_config.vocab_size, WeightWriter(model_config, config.dtype).write)

    def close(self):
        self.process.send_signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(60)
        self.process.kill()


def served_model_config(config):
    return build_chat_and_model(config)[1]


def sharpened(params):
    return {**params, "final_norm": {"scale": params["final_norm"]["scale"] * SHARPNESS}}


@functools.partial(jax.jit, static_argnames="model_config")
def stream_logprobs(params, stream_T, length, temperature, *, model_config):
    """Log-probability of each token of a stream behind those before it; padding behind `length` has none."""
    positions_1T = jnp.arange(len(stream_T))[None, :]
    segments_1T = (positions_1T < length).astype(jnp.int32)
    hidden_1TD, _ = Transformer(model_config).apply({"params": params}, stream_T[None], positions_1T, segments_1T)
    logits_TV = (hidden_1TD[0] @ head_weights(params, model_config)).astype(jnp.float32) / temperature
    return jnp.take_along_axis(jax.nn.log_softmax(logits_TV[:-1]), stream_T[1:, None], axis=-1)[:, 0]


def own_logprobs(model_config, params, prompt, tokens, temperature):
    """What the trainer's model says of `tokens` behind `prompt`. Two padded sizes: compiled as often."""
    length = len(prompt) + len(tokens)
    stream_T = np.zeros(64 if length <= 64 else 1_024, np.int32)
    stream_T[:length] = [*prompt, *tokens]
    logprobs_T = stream_logprobs(params, stream_T, length, temperature, model_config=model_config)
    return np.asarray(logprobs_T)[len(prompt) - 1 : length - 1]


def roll_out(engine, model_config, count, num_tokens, temperature=1.0, seed=0):
    """{prompt: completion} of `count` prompts of many lengths, side by side."""
    rng = np.random.default_rng(seed)
    prompts = [tuple(rng.integers(0, model_config.vocab_size, rng.integers(1, 40)).tolist()) for _ in range(count)]

    async def run():
        asked = Sampling(temperature, num_tokens, frozenset({3}), seed)
        return await asyncio.gather(
            *(engine.generate(prompt, asked, request_id=f"{n}", session_id=f"{n}") for n, prompt in enumerate(prompts))
        )

    return dict(zip(prompts, asyncio.run(run()), strict=True))


def gaps(model_config, params, completions, temperature=1.0):
    return np.concatenate(
        [
            np.abs(each.logprobs - own_logprobs(model_config, params, prompt, each.tokens, temperature))
            for prompt, each in completions.items()
        ]
    )


def start_turns(engine, count, num_tokens):
    """Turns under way; every other one is streamed, and its event `begun` is set once it has 20 tokens."""

    def start(n):
        begun, watched = asyncio.Event(), frozenset(range(1_000))
        asked = Sampling(1.0, num_tokens, frozenset(), 0, watch_ids=watched if n % 2 == 0 else frozenset())
        turn = asyncio.ensure_future(
            engine.generate(
                [n + 5], asked, request_id=f"{n}", session_id=f"{n}",
                on_watched=lambda tokens: begun.set() if len(tokens) >= 20 else None,
            )
        )  # fmt: skip
        turn.begun = begun
        if n % 2:
            begun.set()
        return turn

    return [start(n) for n in range(count)]


def roll_out_one(engine, prompt):
    return asyncio.run(engine.generate(prompt, Sampling(1.0, 4, frozenset(), 0), request_id="one", session_id="one"))
