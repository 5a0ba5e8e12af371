"""Against real SGLang 0.5.23 servers on CPU with a tiny random Qwen3, started by experiments/serve_policy.py.

    bash orchestra_jax/assets/sglang_cpu/install.sh
    pytest -m sglang

SGLANG_PYTHON names the interpreter of another environment with that sglang.
"""

import asyncio
import contextlib
import dataclasses
import functools
import hashlib
import json
import os
import pathlib
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from orchestra_jax.components import build_chat_and_model
from orchestra_jax.config import RunConfig
from orchestra_jax.generation.engine import Sampling
from orchestra_jax.generation.sglang_engine import SGLangEngine
from orchestra_jax.models.lora import LoraConfig, init_lora, merge
from orchestra_jax.models.transformer import Transformer, head_weights, init_params
from orchestra_jax.models.weight_files import WeightWriter
from orchestra_jax.types import StopReason

pytestmark = pytest.mark.sglang

ROOT = pathlib.Path(__file__).parents[3]
RECIPE = ROOT / "orchestra_jax" / "assets" / "sglang_cpu" / "install.sh"
START_S = 600.0  # half a minute on a quiet machine
SHARPNESS = 3.0  # of the last norm: a random model is almost uniform without it


@pytest.fixture(scope="module")
def server_python():
    if named := os.environ.get("SGLANG_PYTHON"):
        assert os.access(named, os.X_OK), f"SGLANG_PYTHON={named} names no interpreter"
        return named
    name = f"sglang_cpu_{hashlib.sha256(RECIPE.read_bytes()).hexdigest()[:12]}"
    cache = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache")
    python = str(cache / "orchestra_jax" / name / "bin" / "python")
    if not os.access(python, os.X_OK):
        pytest.skip(f"no environment of a server at {python}: run {RECIPE.relative_to(ROOT)}")
    return python


def free_port():
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def ask(url, path, body=None, timeout_s=60.0):
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url + path, data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=timeout_s) as reply:
        return json.loads(reply.read())


def label(url):
    try:
        return ask(url, "/model_info", timeout_s=5.0)["weight_version"]
    except (OSError, ValueError):
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
            "--config.engine=sglang",
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


@pytest.fixture(scope="module")
def served(server_python, tmp_path_factory):
    servers = Served(server_python, tmp_path_factory.mktemp("served"), 2, "float32").wait()
    yield servers
    servers.close()


@pytest.fixture(scope="module")
def model_config(served):
    return served_model_config(served.config)


@pytest.fixture(scope="module")
def params(model_config):
    return sharpened(init_params(model_config, jax.random.key(0)))


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


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_logprobs_equal_the_trainers_in_float32(served, model_config, params, temperature):
    engine = served.engine()
    asyncio.run(engine.update_weights(params, 1))
    completions = roll_out(engine, model_config, 12, 24, temperature)
    gap = gaps(model_config, params, completions, temperature)
    logprobs = np.concatenate([each.logprobs for each in completions.values()])
    print(
        f"float32, temperature {temperature}: {len(gap)} tokens of mean log-probability {logprobs.mean():.2f}, "
        f"gap mean {gap.mean():.2e}, max {gap.max():.2e}"
    )
    assert gap.max() <= 1e-3 and logprobs.std() > 0.1  # almost sure or all alike would show nothing
    for each in completions.values():
        assert (each.tokens[:-1] != 3).all() and len(each.tokens) == len(each.logprobs) <= 24
        assert each.stop_reason == (StopReason.STOP if each.tokens[-1] == 3 else StopReason.LENGTH)
        assert (each.policy_versions == 1).all()


def test_every_update_changes_the_weights_and_a_lora_sends_what_it_changed(served, model_config, params):
    engine, seen = served.engine(), {}
    lora = LoraConfig(rank=2, projections=("query", "down"))
    factors = jax.tree.map(lambda leaf: leaf + 0.01, init_lora(lora, params, jax.random.key(1)))
    merged = merge(params, factors, 2.0)
    asyncio.run(engine.update_weights(params, 1))
    seen[1] = [checksums(url) for url in served.urls]
    asyncio.run(engine.update_weights(merged, 2))
    seen[2] = [checksums(url) for url in served.urls]
    newest = served.directory / "weights" / "v000002" / "model.safetensors"
    assert newest.stat().st_size < 0.5 * (newest.parents[1] / "v000001" / "model.safetensors").stat().st_size
    completions = roll_out(engine, model_config, 6, 16)
    assert gaps(model_config, merged, completions).max() <= 1e-3
    fresh = served.engine()
    asyncio.run(fresh.update_weights(merged, 3))  # all of it
    assert [checksums(url) for url in served.urls] == seen[2]
    assert seen[1][0] == seen[1][1] and seen[2][0] == seen[2][1]
    changed = {name for name, value in seen[1][0].items() if seen[2][0][name] != value}
    assert changed and all("qkv_proj" in name or "down_proj" in name for name in changed)


def test_a_watched_id_is_told_while_the_server_still_samples(served, model_config, params):
    engine, heard = served.engine(), []
    asyncio.run(engine.update_weights(params, 1))
    watched = frozenset(range(0, model_config.vocab_size, 7))

    async def run():
        asked = Sampling(1.0, 200, frozenset(), 0, watch_ids=watched)
        return await engine.generate(
            [5, 6], asked, request_id="w", session_id="w",
            on_watched=lambda tokens: heard.append((time.monotonic(), tokens.tolist())),
        )  # fmt: skip

    completion = asyncio.run(run())
    end_s = time.monotonic()
    tokens = completion.tokens.tolist()
    assert len(tokens) == 200 and gaps(model_config, params, {(5, 6): completion}).max() <= 1e-3
    assert [each for _, each in heard] == [tokens[: n + 1] for n, token in enumerate(tokens) if token in watched]
    assert len(heard) > 5 and heard[0][0] < end_s - 0.05


def test_an_update_in_the_middle_of_turns_keeps_their_tokens(served, model_config, params):
    engine = served.engine()
    asyncio.run(engine.update_weights(params, 1))
    others = sharpened(init_params(model_config, jax.random.key(5)))

    async def run():
        turns = start_turns(engine, 4, 600)
        await turns[0].begun.wait()
        await engine.update_weights(others, 2)
        return await asyncio.gather(*turns)

    for n, completion in enumerate(asyncio.run(run())):
        num_old = int((completion.policy_versions == 1).sum())
        assert completion.policy_versions.tolist() == [1] * num_old + [2] * (600 - num_old)
        tokens = completion.tokens.tolist()
        # The last token of the old weights may already be sampled when the pause comes: one place is left out.
        old = np.abs(completion.logprobs[:num_old] - own_logprobs(model_config, params, [n + 5], tokens[:num_old], 1.0))
        new = completion.logprobs[num_old:] - own_logprobs(
            model_config, others, [n + 5, *tokens[:num_old]], tokens[num_old:], 1.0
        )
        assert 0 < num_old < 600, "the update came too early or too late: nothing is shown"
        assert old.max() <= 1e-3 and np.abs(new).max() <= 1e-3


def test_abort_and_bad_ids_leave_the_server_as_it_was(served, model_config, params):
    engine = served.engine()
    asyncio.run(engine.update_weights(params, 1))
    with pytest.raises(ValueError, match="are not all in"):
        roll_out_one(engine, [model_config.vocab_size])

    async def run():
        (turn,) = start_turns(engine, 1, 900)
        await turn.begun.wait()
        await engine.abort("0")
        return await turn

    completion = asyncio.run(run())
    assert completion.stop_reason == StopReason.ABORTED and 0 < len(completion.tokens) < 900
    assert gaps(model_config, params, {(5,): completion}).max() <= 1e-3
    assert roll_out_one(engine, [5]).stop_reason == StopReason.LENGTH
    assert all(label(url) == "1" for url in served.urls)


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


def test_a_server_left_paused_is_usable_by_the_next_trainer(served, params):
    for url in served.urls:
        ask(url, "/pause_generation", {"mode": "retract"})
    engine = served.engine()
    asyncio.run(engine.update_weights(params, 4))
    assert (roll_out_one(engine, [5]).policy_versions == 4).all()


def test_a_killed_server_loses_no_turn_and_comes_back_with_the_current_weights(served, model_config, params):
    engine = served.engine()
    asyncio.run(engine.update_weights(params, 7))
    killed = served.urls[1]
    pid = served.pid(killed)

    async def run():
        turns = start_turns(engine, 16, 150)
        for turn in turns[:4]:  # of both servers
            await turn.begun.wait()
        os.kill(pid, signal.SIGKILL)
        return await asyncio.gather(*turns)

    completions = asyncio.run(run())
    assert [each.stop_reason for each in completions] == [StopReason.LENGTH] * 16
    assert all(len(each.tokens) == 150 and (each.policy_versions == 7).all() for each in completions)
    assert gaps(model_config, params, {(n + 5,): each for n, each in enumerate(completions)}).max() <= 1e-3
    wait_for(lambda: served.pid(killed) != pid and label(killed), START_S, "restarted server")
    assert label(killed) == "7"  # from the directory of the newest weights, before anybody asks
    asyncio.run(engine.update_weights(params, 8))
    assert [label(url) for url in served.urls] == ["8", "8"]


def test_the_quickstart_trains_through_a_kill(served, tmp_path):
    """Three steps; versions 0 to 3 on the server, each with other weights; then the evaluation's."""
    versions, stop = {}, threading.Event()
    steady, killed = served.urls

    def look():
        order = versions.setdefault("order", [])
        while not stop.is_set():
            try:
                before, sums = label(steady), checksums(steady)
                after = label(steady)
            except OSError:
                continue
            if before == after and (not order or order[-1] != after):
                order.append(after)
                versions.setdefault(after, sums)
            if after == "1" and "killed" not in versions:
                versions["killed"] = True
                os.kill(served.pid(killed), signal.SIGKILL)
            time.sleep(0.1)

    asyncio.run(served.engine().update_weights(init_params(served_model_config(served.config), jax.random.key(9)), 99))
    watcher = threading.Thread(target=look, daemon=True)
    watcher.start()
    command = [
        sys.executable, "-m", "experiments.train", "--config=configs/smoke.py", f"--workdir={tmp_path / 'run'}",
        *served.overrides, "--config.sglang.max_attempts=40", "--config.grpo.max_sampler_gap=0.001",
        "--config.grpo.min_group_std=0.0", "--config.grpo.entropy_coefficient=0.01",  # each step moves the weights
        "--config.grpo.num_groups=4", "--config.grpo.groups_per_micro_batch=4", "--config.warm_start.num_steps=5",
        "--config.evaluation.num_per_preference=4",
    ]  # fmt: skip
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=1500)
    stop.set()
    watcher.join()
    assert result.returncode == 0, result.stderr[-3000:]
    steps = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    figures = [(step["sampler/gap_mean"], step["loss/sampler_gap_max"]) for step in steps]
    print(f"quickstart, gap mean and max by step: {figures}; versions seen: {versions['order']}")
    assert versions["killed"] and [step["step"] for step in steps] == [0, 1, 2]
    assert all(step["loss/sampler_gap_max"] <= 1e-3 for step in steps)  # one update a step: same weights in both
    assert all(step["filter/failed_share"] == 0 and "episode/status/engine_failure" not in step for step in steps)
    assert versions["order"][:5] == ["99", "0", "1", "2", "3"]
    different = {json.dumps(versions[name], sort_keys=True) for name in ("0", "1", "2", "3")}
    assert len(different) == 4
    assert len(list((tmp_path / "run" / "trajectories").iterdir())) > 0


def test_in_bfloat16_the_mean_gap_stays_below_the_alarm(server_python, tmp_path):
    servers = Served(server_python, tmp_path, 1, "bfloat16").wait()
    try:
        model_config = served_model_config(servers.config)
        params = init_params(model_config, jax.random.key(0))
        engine = servers.engine()
        asyncio.run(engine.update_weights(params, 1))
        gap = gaps(model_config, params, roll_out(engine, model_config, 12, 24))
        print(f"bfloat16: {len(gap)} tokens, gap mean {gap.mean():.2e}, max {gap.max():.2e}")
        assert gap.mean() <= 2e-2
    finally:
        servers.close()
