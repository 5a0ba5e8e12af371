"""Decoding at Qwen3's vocabulary on one core: tokens per CPU second of the embedded engine, and of peers behind it.

    python -m experiments.benchmark --suite=decode
    python -m experiments.benchmark --suite=decode --option=tunix_python=VENV/bin/python
    python -m experiments.benchmark --suite=decode --option=torch_python=VENV/bin/python

Hidden 256, mlp 768, 4 layers, 8/4 heads of 32, vocabulary 151,936, float32. `batch`: 8 prompts of 128 tokens, 128 new
ones each. `ragged`: 64 episodes of 1 to 6 turns; the lengths of prompts, turns and observations are geometric, and a
tool takes no time. The peers get the ragged work in the best form that a sampler of whole batches has: the next turns
of 8 episodes at a time, each with its whole stream as the prompt, padded to a power of two. Sampled at temperature 1.
CPU seconds are those of the process, compiled beforehand. `num_cores=0`: all of them, with the threads that each
library takes by itself; more threads spend more CPU seconds on the same work.
"""

from __future__ import annotations

import asyncio
import json
import os
import pathlib
import subprocess
import time

import numpy as np

SHAPE = {"vocab_size": 151_936, "hidden": 256, "mlp": 768, "layers": 4, "heads": 8, "kv_heads": 4, "head_dim": 32}
NUM_ROWS, NUM_PROMPT_TOKENS, NUM_NEW_TOKENS = 8, 128, 128
NUM_EPISODES, MAX_TURNS, MAX_TOKENS = 64, 6, 512


def run(
    parts: str = "batch,ragged", num_episodes: int = NUM_EPISODES, temperature: float = 1.0, tunix_python: str = "",
    torch_python: str = "", num_cores: int = 1,
) -> dict[str, object]:  # fmt: skip
    """The figures of `parts` by name, pinned to the first `num_cores` cores. ValueError for a part that is none."""
    unknown = set(parts.split(",")) - {"batch", "ragged"}
    if unknown:
        raise ValueError(f"parts {sorted(unknown)} are none of batch, ragged")
    if num_cores:
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:num_cores])  # before jax starts its threads
    figures: dict[str, object] = {"temperature": temperature, "num_cores": len(os.sched_getaffinity(0))}
    for part in parts.split(","):
        work = batch_work() if part == "batch" else ragged_work(num_episodes)
        figures |= {f"{part}/{name}": value for name, value in measure(work, temperature).items()}
        for peer, python in (("tunix", tunix_python), ("torch", torch_python)):
            if python:
                found = measure_peer(peer, python, work, temperature)
                figures |= {f"{part}/{peer}/{name}": value for name, value in found.items()}
    return figures


def batch_work() -> list[list[tuple[list[int], int]]]:
    """Episodes; an episode is its turns: tokens that it is given, and how many it then samples."""
    rng = np.random.default_rng(0)
    return [[(_tokens(rng, NUM_PROMPT_TOKENS), NUM_NEW_TOKENS)] for _ in range(NUM_ROWS)]


def ragged_work(num_episodes: int) -> list[list[tuple[list[int], int]]]:
    rng = np.random.default_rng(1)

    def geometric(mean: float, most: int) -> int:
        return int(min(rng.geometric(1 / mean), most))

    episodes = []
    for _ in range(num_episodes):
        turns = [(_tokens(rng, geometric(64, 128)), geometric(24, 48))]
        for _ in range(int(rng.integers(0, MAX_TURNS))):
            turns.append((_tokens(rng, geometric(12, 24)), geometric(24, 48)))
        episodes.append(turns)
    return episodes


def measure(work, temperature: float) -> dict[str, float]:
    import jax

    from orchestra_jax.generation.jax_engine import JaxEngine, JaxEngineConfig
    from orchestra_jax.models.config import ModelConfig
    from orchestra_jax.models.transformer import init_params

    model = ModelConfig(
        SHAPE["vocab_size"], SHAPE["hidden"], SHAPE["mlp"], SHAPE["layers"], SHAPE["heads"], SHAPE["kv_heads"],
        SHAPE["head_dim"], is_tied=False, compute_dtype="float32",
    )  # fmt: skip
    sizes = JaxEngineConfig(
        num_rows=NUM_EPISODES, max_tokens=MAX_TOKENS, row_buckets=(NUM_ROWS,), slot_buckets=(128, 256), chunk_rows=2,
        chunk_buckets=(16, 32, 64, 128), steps_per_dispatch=16,
    )  # fmt: skip
    params = init_params(model, jax.random.key(0))
    engine = JaxEngine(model, params, sizes)
    asyncio.run(play(engine, work, temperature, seed=0))  # compiles
    asyncio.run(engine.update_weights(params, 1))
    engine.counters = type(engine.counters)()
    start_s, start_wall_s = time.process_time(), time.monotonic()
    num_tokens = asyncio.run(play(engine, work, temperature, seed=0))
    cpu_s, wall_s, counters = time.process_time() - start_s, time.monotonic() - start_wall_s, engine.counters
    python_share = measure_python(engine, work, temperature, params)
    return {
        "tokens_per_cpu_s": num_tokens / cpu_s,
        "num_tokens": num_tokens,
        "occupancy_while_waiting": counters.num_waited_used_row_steps / max(counters.num_waited_row_steps, 1),
        "num_dispatches": counters.num_dispatches,
        "python_share": python_share,
        "wall_s": wall_s,
    }


def measure_python(engine, work, temperature: float, params) -> float:
    """The share of the CPU seconds of the same work that is spent outside of the compiled calls, each waited for."""
    import jax

    from orchestra_jax.generation import jax_engine, lanes

    spent_s = 0.0

    def timed(function):
        def call(*args, **sizes):
            nonlocal spent_s
            start_s = time.process_time()
            result = jax.block_until_ready(function(*args, **sizes))
            spent_s += time.process_time() - start_s
            return result

        return call

    places = [(lanes, "decode"), (lanes, "decode_few"), (jax_engine, "extend"), (jax_engine, "copy_rows")]
    originals = [getattr(module, name) for module, name in places]
    asyncio.run(engine.update_weights(params, 2))
    try:
        for (module, name), function in zip(places, originals, strict=True):
            setattr(module, name, timed(function))
        start_s = time.process_time()
        asyncio.run(play(engine, work, temperature, seed=0))
        total_s = time.process_time() - start_s
    finally:
        for (module, name), function in zip(places, originals, strict=True):
            setattr(module, name, function)
    return 1 - spent_s / total_s


async def play(engine, work, temperature: float, seed: int) -> int:
    """Plays all episodes at once; the number of tokens that were sampled."""
    from orchestra_jax.generation.engine import Sampling

    async def play_one(number: int, turns) -> int:
        stream, num_tokens = [], 0
        for given, num_new in turns:
            stream += given
            how = Sampling(temperature, num_new, frozenset(), seed)
            names = {"request_id": f"{number}@{len(stream)}", "session_id": f"{seed}/{number}"}
            completion = await engine.generate(stream, how, **names)
            stream += completion.tokens.tolist()
            num_tokens += len(completion.tokens)
        return num_tokens

    return sum(await asyncio.gather(*(play_one(number, turns) for number, turns in enumerate(work))))


def peer_batches(work) -> list[tuple[int, int, int]]:
    """(rows, padded prompt length, new tokens) of each batch of NUM_ROWS turns that a sampler of batches runs."""
    lengths, batches = [0] * len(work), []
    for turn in range(max(map(len, work))):
        numbers = [number for number, turns in enumerate(work) if len(turns) > turn]
        for begin in range(0, len(numbers), NUM_ROWS):
            batch = numbers[begin : begin + NUM_ROWS]
            for number in batch:
                lengths[number] += len(work[number][turn][0])
            num_new = [work[number][turn][1] for number in batch]
            longest = max(lengths[number] for number in batch)
            batches.append((len(batch), 1 << (longest - 1).bit_length(), max(num_new)))
            for number, new in zip(batch, num_new, strict=True):
                lengths[number] += new
    return batches


def measure_peer(peer: str, python: str, work, temperature: float) -> dict[str, float]:
    """From what _{peer}_decode.py prints under the interpreter `python`, on the same cores: CPU seconds by batch."""
    script = pathlib.Path(__file__).with_name(f"_{peer}_decode.py")
    task = {"shape": SHAPE, "batches": peer_batches(work), "temperature": temperature}
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    environment.pop("PYTHONPATH", None)
    command = [python, script, json.dumps(task)]
    result = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=environment)
    cpu_s = sum(json.loads(result.stdout.splitlines()[-1]))
    num_tokens = sum(num_new for turns in work for _, num_new in turns)
    return {"tokens_per_cpu_s": num_tokens / cpu_s, "cpu_s": cpu_s}


def _tokens(rng, number: int) -> list[int]:
    return rng.integers(2, SHAPE["vocab_size"], number).tolist()
