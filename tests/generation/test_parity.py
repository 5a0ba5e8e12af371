"""Greedy turns against the golden files of transformers' generate (tests/golden/make_generations.py)."""

import asyncio
import dataclasses
import pathlib

import numpy as np

from orchestra_jax.generation.engine import Sampling
from orchestra_jax.generation.jax_engine import JaxEngine, JaxEngineConfig
from orchestra_jax.models.huggingface import load_pretrained

GOLDEN = pathlib.Path(__file__).parents[1] / "golden"
NEAR_TIE = 1e-4  # between the reference's two best logits: there another order of summation may choose the other token
# Fewer rows than prompts, and prompts of up to three chunks.
SIZES = JaxEngineConfig(
    num_rows=48, max_tokens=64, row_buckets=(32,), slot_buckets=(), chunk_rows=8, chunk_buckets=(16,)
)


def greedy(name, golden):
    """The greedy completions of a golden file's prompts, asked for at once."""
    model, params = load_pretrained(GOLDEN / name)
    config = dataclasses.replace(model.config, compute_dtype="float32")
    engine = JaxEngine(config, params, SIZES)
    how = Sampling(0.0, golden["tokens"].shape[1], frozenset(), 0)

    async def ask():
        requests = (
            engine.generate(prompt[:length].tolist(), how, request_id=f"{number}", session_id=f"{number}")
            for number, (prompt, length) in enumerate(zip(golden["prompts"], golden["lengths"]))
        )
        return await asyncio.gather(*requests)

    return asyncio.run(ask())


def test_greedy_turns_are_those_of_transformers():
    num_prompts = num_other = 0
    for name in ("qwen3_tied", "qwen2", "llama3"):
        golden = np.load(GOLDEN / name / "generations.npz")
        for completion, tokens, gaps in zip(greedy(name, golden), golden["tokens"], golden["gaps"], strict=True):
            num_prompts += 1
            other = np.flatnonzero(completion.tokens != tokens)
            if len(other):
                # From the first other token on the contexts differ: only that one has to be a near tie.
                assert gaps[other[0]] < NEAR_TIE, (name, other[0])
                num_other += 1
    assert num_prompts == 200 and num_other < 0.01 * num_prompts
