"""What the data pipeline makes in a CPU second of this process: rows of a file -> instances -> tokens of the prompts.

    python -m experiments.benchmark --suite=pipeline
    python -m experiments.benchmark --suite=pipeline --option=num_rows=1000000

The rows are synthetic questions of 12 words in the form of FRAMES; each instance draws experts, prices, latencies and a
preference, and its prompt is the compact one of the quickstart, with its tokenizer. No worker processes.
"""

from __future__ import annotations

import functools
import json
import pathlib
import resource
import tempfile
import time

import numpy as np

from orchestra_jax.chat import SMALL_TOKENIZER_DIRECTORY, encode_prompt, load_chat
from orchestra_jax.data.instances import make_instance
from orchestra_jax.data.loaders.questions import FORMATS
from orchestra_jax.data.pipeline import InstanceStream, Part
from orchestra_jax.data.preferences import PREFERENCES
from orchestra_jax.data.sources.jsonl import JsonlSource
from orchestra_jax.environments.question_answering import render_user_text
from orchestra_jax.experts.world import WorldConfig
from orchestra_jax.types import Message

WORDS = (
    "what is the capital of country that borders element symbol number which region has code france spain italy iron "
    "gold sum product price fast least common multiple base two ten"
).split()
NUM_PER_BATCH = 64
WORLD, PREFERENCE_LIST = WorldConfig(), tuple(PREFERENCES.values())


def make_question(task, seed):
    return make_instance(task, PREFERENCE_LIST[seed % len(PREFERENCE_LIST)], WORLD, seed)


def encode(instance, chat):
    return encode_prompt(chat, [Message("user", render_user_text(instance, has_table=True))], [])


def run(num_rows: int = 20_000, num_batches: int = 100) -> dict[str, float]:
    """Figures by name, units in the names; the memory is what opening the indexed file adds to the process's peak."""
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / "rows.jsonl"
        _write_rows(path, num_rows)
        start_s = time.process_time()
        JsonlSource(path, FORMATS["frames"])
        index_s = time.process_time() - start_s
        before_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        start_s = time.process_time()
        source = JsonlSource(path, FORMATS["frames"])
        open_s = time.process_time() - start_s
        opened_mib = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before_kib) / 1024
        chat = load_chat(SMALL_TOKENIZER_DIRECTORY, "compact")
        parts = (Part("questions", source, make_question),)
        stream = InstanceStream(parts, NUM_PER_BATCH, 0, encode=functools.partial(encode, chat=chat))
        prompts = next(stream)  # the first batch pays for what is made once
        seconds = []
        for _ in range(num_batches):
            start_s = time.process_time()
            prompts = next(stream)
            seconds.append(time.process_time() - start_s)
    num_tokens = float(np.mean([len(each.prompt_tokens) for each in prompts]))
    return {
        "prompts_per_cpu_s": NUM_PER_BATCH / float(np.mean(seconds)),
        "prompts_per_cpu_s_of_the_best_batch": NUM_PER_BATCH / min(seconds),  # other jobs on the machine aside
        "tokens_per_prompt": num_tokens,
        "rows_indexed_per_cpu_s": num_rows / index_s,
        "open_cpu_ms": 1e3 * open_s,
        "open_mib": opened_mib,
    }


def _write_rows(path: pathlib.Path, num_rows: int) -> None:
    rng = np.random.default_rng(0)
    with open(path, "w") as file:
        for number in range(num_rows):
            question = " ".join(rng.choice(WORDS, 12)) + f" {number}?"
            file.write(json.dumps({"id": f"wiki____{number}", "question": question, "answer": str(number)}) + "\n")
