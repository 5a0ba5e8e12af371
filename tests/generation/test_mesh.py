"""The engine on a mesh of simulated devices against the engine without one."""

import os
import pathlib
import subprocess
import sys

import jax
import pytest

from orchestra_jax import sharding
from orchestra_jax.generation.jax_engine import JaxEngine, JaxEngineConfig
from orchestra_jax.models import transformer
from orchestra_jax.models.config import MODELS

SHARDED_EQUALS_UNSHARDED = """
import asyncio, dataclasses, jax, numpy as np
from orchestra_jax import sharding
from orchestra_jax.generation import decoding
from orchestra_jax.generation.engine import Sampling
from orchestra_jax.generation.jax_engine import JaxEngine, JaxEngineConfig
from orchestra_jax.models import transformer
from orchestra_jax.models.config import MODELS

config = dataclasses.replace(MODELS["tiny"], vocab_size=38)
params = transformer.init_params(config, jax.random.key(0))
sizes = JaxEngineConfig(num_rows=8, max_tokens=40, row_buckets=(4,), slot_buckets=(), chunk_rows=2, chunk_buckets=(8,))

def play(engine):
    async def ask(number):
        stream, found = [number + 1] * (3 + number), []
        for _ in range(2):
            how = Sampling(1.0, 6, frozenset(), 0)
            found.append(await engine.generate(stream, how, request_id=f"{number}", session_id=f"{number}"))
            stream = [*stream, *found[-1].tokens.tolist(), 5, 6]
        return found

    async def ask_all():
        return await asyncio.gather(*map(ask, range(6)))

    return asyncio.run(ask_all())

plain = play(JaxEngine(config, params, sizes))
mesh = sharding.make_mesh({"fsdp": 2, "tensor": 2})
placed = sharding.place(params, sharding.shardings(transformer.logical_axes(config), mesh))
for function in (decoding.extend, decoding.copy_rows, decoding.decode):
    function.clear_cache()
engine = JaxEngine(config, placed, sizes, mesh=mesh)
for ours, theirs in zip(play(engine), plain, strict=True):
    for one, other in zip(ours, theirs, strict=True):
        np.testing.assert_array_equal(one.tokens, other.tokens)
        np.testing.assert_allclose(one.logprobs, other.logprobs, atol=1e-4)
keys = engine._store_cache.keys_LCKHS
assert keys.addressable_shards[0].data.shape[2] * 2 == config.num_kv_heads, keys.sharding
assert decoding.decode._cache_size() == 1 and decoding.extend._cache_size() == 1, decoding.decode._cache_size()
print("sharded equals unsharded")
"""


@pytest.mark.slow
def test_sharded_turns_equal_unsharded_ones():
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=4"}
    environment["PYTHONPATH"] = str(pathlib.Path(sharding.__file__).parents[1])
    result = subprocess.run(
        [sys.executable, "-c", SHARDED_EQUALS_UNSHARDED], env=environment, capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert "sharded equals unsharded" in result.stdout


def test_a_mesh_that_does_not_divide_the_heads_is_refused():
    config = MODELS["tiny"]
    mesh = jax.sharding.AbstractMesh((4,), ("tensor",))
    with pytest.raises(ValueError, match="2 key-value heads over a tensor axis of 4"):
        JaxEngine(config, transformer.init_params(config, jax.random.key(0)), JaxEngineConfig(), mesh=mesh)
