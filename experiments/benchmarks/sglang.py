r"""What the client of SGLang servers costs, and how fast new weights are written: CPU microseconds, bytes a second.

    python -m experiments.benchmark --suite=sglang
    python -m experiments.benchmark --suite=sglang --option=parts=sync --option=num_bytes=16400000000 \
        --option=directory=/dev/shm

`client`: turns against a bare HTTP server in a process of its own that answers at once; the CPU seconds are this
process's alone. `sync`: parameters on the device to safetensors, flushed and renamed, against a copy of the same bytes
by shutil.copyfile, flushed too; alternately, the best of each.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import multiprocessing
import os
import pathlib
import shutil
import tempfile
import time

import jax
import jax.numpy as jnp

from orchestra_jax.generation.engine import Sampling
from orchestra_jax.generation.sglang.weight_directory import write_version
from orchestra_jax.generation.sglang_engine import SGLangConfig, SGLangEngine
from orchestra_jax.models.config import MODELS
from orchestra_jax.models.transformer import init_params
from orchestra_jax.models.weight_files import WeightWriter

VOCAB_SIZE = 151_936
NUM_ROUNDS = 3


def run(
    parts: str = "client,sync", num_bytes: int = 2_000_000_000, directory: str = "", concurrency: int = 256
) -> dict[str, float]:
    """The figures of some parts. num_bytes: of the weights, about. directory: where they go; "": a temporary one."""
    measures = {
        "client": lambda: measure_client(concurrency),
        "sync": lambda: measure_sync(num_bytes, directory),
    }
    if unknown := sorted(set(parts.split(",")) - set(measures)):
        raise ValueError(f"parts {unknown} are not among {sorted(measures)}")
    return {name: value for part in parts.split(",") for name, value in measures[part]().items()}


def measure_client(concurrency: int, num_requests: int = 2_048, num_prompt: int = 512, num_new: int = 128) -> dict:
    """CPU microseconds of this process for a turn of `num_prompt` tokens in and `num_new` out."""
    tokens = [(7 * number) % VOCAB_SIZE for number in range(num_new)]
    about = {
        "finish_reason": {"type": "length", "length": num_new}, "completion_tokens": num_new, "weight_version": "0",
        "weight_versions": [{"version": "0", "start": 0, "end": num_new}],
        "output_token_logprobs": [[-1.2345678, token, None] for token in tokens],
    }  # fmt: skip
    reply = json.dumps({"output_ids": tokens, "meta_info": about}).encode()
    receiver, sender = multiprocessing.Pipe(duplex=False)
    server = multiprocessing.get_context("spawn").Process(target=_serve, args=(sender, reply), daemon=True)
    server.start()
    url = f"http://127.0.0.1:{receiver.recv()}"
    try:
        with tempfile.TemporaryDirectory() as scratch:
            config = SGLangConfig((url,), weights_directory=scratch, max_concurrent=concurrency)
            engine = SGLangEngine(config, VOCAB_SIZE, lambda params, path: bool((path / "w").write_bytes(b"w")))
            asyncio.run(engine.update_weights(None, 0))
            sampling, prompt = Sampling(1.0, num_new, frozenset({VOCAB_SIZE - 1}), 0), list(range(num_prompt))

            async def ask(count):
                await asyncio.gather(
                    *(engine.generate(prompt, sampling, request_id=f"{n}", session_id=f"{n}") for n in range(count))
                )

            asyncio.run(ask(concurrency))
            start_s = time.process_time()
            asyncio.run(ask(num_requests))
            used_s = time.process_time() - start_s
    finally:
        server.kill()
    return {"client/concurrency": concurrency, "client/cpu_us_per_request": used_s / num_requests * 1e6}


def _serve(sender, reply: bytes) -> None:
    """Answers every request as it comes, with no framework between: its time is not the client's."""
    label = b'{"weight_version": "0", "success": true}'

    async def handle(reader, writer):
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                lines = head.lower().split(b"\r\n")
                length = next((line for line in lines if line.startswith(b"content-length")), b":0")
                await reader.readexactly(int(length.split(b":")[1]))
                body = reply if b"/generate" in head else label
                writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n")
                writer.write(b"Content-Length: %d\r\n\r\n" % len(body) + body)
        except (asyncio.IncompleteReadError, ConnectionError):
            writer.close()

    async def serve():
        server = await asyncio.start_server(handle, "127.0.0.1", 0, backlog=2_048)
        sender.send(server.sockets[0].getsockname()[1])
        await server.serve_forever()

    asyncio.run(serve())


def measure_sync(num_bytes: int, directory: str) -> dict:
    """Seconds of wall clock and of CPU; the layers are Qwen3-8B's, as many as `num_bytes` holds."""
    full = MODELS["qwen3-8b"]
    per_layer = 2 * (2 * full.hidden_size * (full.num_heads + full.num_kv_heads) * full.head_dim)
    per_layer += 2 * 3 * full.hidden_size * full.intermediate_size
    num_layers = max(min(num_bytes // per_layer, full.num_layers), 1)
    vocab_size = full.vocab_size if num_layers == full.num_layers else 1_024
    config = dataclasses.replace(full, num_layers=num_layers, vocab_size=vocab_size, parameter_dtype="bfloat16")
    shapes = jax.eval_shape(lambda: init_params(config, jax.random.key(0)))
    key = jax.random.key(0)
    # Random bits are what the time is measured on: cheap to make, and nothing can leave them out.
    params = jax.tree.map(lambda leaf: jax.random.bits(key, leaf.shape, "uint16").view(jnp.bfloat16), shapes)
    jax.block_until_ready(params)
    scratch = pathlib.Path(tempfile.mkdtemp(dir=directory or None))
    try:
        times = {"write": [], "copy": []}
        for number in range(NUM_ROUNDS):
            writer = WeightWriter(config, "bfloat16")
            start = time.monotonic(), time.process_time()
            path, _ = write_version(scratch, number, lambda place, writer=writer: writer.write(params, place))
            times["write"].append((time.monotonic() - start[0], time.process_time() - start[1]))
            source, size = path / "model.safetensors", (path / "model.safetensors").stat().st_size
            start = time.monotonic(), time.process_time()
            shutil.copyfile(source, scratch / "copy")
            descriptor = os.open(scratch / "copy", os.O_RDONLY)
            os.fsync(descriptor)
            os.close(descriptor)
            times["copy"].append((time.monotonic() - start[0], time.process_time() - start[1]))
            (scratch / "copy").unlink()
            shutil.rmtree(path)
    finally:
        shutil.rmtree(scratch)
    write, copy = (tuple(min(each) for each in zip(*times[name], strict=True)) for name in ("write", "copy"))
    return {
        "sync/bytes": size,
        "sync/write_s": write[0],
        "sync/copy_s": copy[0],
        "sync/share_of_copy_speed": copy[0] / write[0],
        "sync/write_cpu_s": write[1],
        "sync/copy_cpu_s": copy[1],
    }
