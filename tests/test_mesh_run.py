"""The smoke run on a mesh of two simulated devices, in a process of its own: it samples and resumes there."""

import os
import pathlib
import subprocess
import sys

import pytest

REPOSITORY = pathlib.Path(__file__).parents[1]

RUN_AND_RESUME = """
import json, pathlib, shutil, sys
import jax
from configs.smoke import get_config
from orchestra_jax import training
from orchestra_jax.generation import decoding

axis, directory = sys.argv[1], pathlib.Path(sys.argv[2])
assert jax.device_count() == 2
config = get_config()
setattr(config.mesh, axis, 2)
config.warm_start.num_steps, config.evaluation.num_per_preference = 10, 8
config.grpo.min_group_std, config.grpo.entropy_coefficient = 0.0, 0.01  # every step moves the weights
restored, restore = [], training.restore

def watched(*arguments):
    progress = restore(*arguments)
    if progress is not None:
        arrays = (progress.state.optimizer_state, progress.reference_params)
        restored.append((progress.step, jax.tree.map(lambda x: (x.shape, x.sharding), arrays)))
        moved = jax.tree.map(lambda x, y: bool((x != y).any()), progress.state.params, progress.reference_params)
        assert all(jax.tree.leaves(moved))
    return progress

training.restore = watched
engines, build_engine = [], training.build_engine

def kept(*arguments, **options):
    engines.append(build_engine(*arguments, **options))
    return engines[-1]

training.build_engine = kept

def metrics():
    lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    timed = ("speed/", "sampler/tokens_per_s")
    return [{name: value for name, value in line.items() if not name.startswith(timed)} for line in lines]

summary, lines = training.run(config, str(directory)), metrics()
shutil.rmtree(directory / "checkpoints" / "3")
(directory / "summary.json").unlink()
again = training.run(config, str(directory))
assert metrics() == lines and len(lines) == 3, (metrics(), lines)
assert again["policies"] == summary["policies"]
((step, (optimizer_state, reference_params)),) = restored
assert step == 2
is_place = lambda leaf: isinstance(leaf, tuple) and len(leaf) == 2 and isinstance(leaf[1], jax.sharding.Sharding)
shape, place = reference_params["layers"]["attention"]["query"]
moments = [pair for pair in jax.tree.leaves(optimizer_state, is_leaf=is_place) if pair[0] == shape]
assert moments
for _, place in [(shape, place), *moments]:
    assert place.num_devices == 2 and place.is_fully_replicated == (axis == "data"), place
engine = engines[0]  # the loop's: it samples on the mesh, from the weights where the trainer has them
assert engine._params["layers"]["attention"]["query"].sharding.is_equivalent_to(place, len(shape))
keys = engine._store_cache.keys_LCKHS
assert keys.sharding.num_devices == 2 and keys.sharding.is_fully_replicated == (axis != "tensor"), keys.sharding
# New weights after each step compile nothing: each lane has one program, and one for its few last turns.
num_compiled = decoding.decode._cache_size(), decoding.decode_few._cache_size()
assert max(num_compiled) <= len(config.jax_engine.slot_buckets) + 1, num_compiled
assert max(line["loss/sampler_gap_max"] for line in lines) < 1e-4
print("resumed as it was")
"""


@pytest.mark.slow
@pytest.mark.parametrize("axis", ["data", "fsdp", "tensor"])
def test_the_smoke_run_on_two_devices_resumes_as_it_was(axis, tmp_path):
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "NPROC": "8",  # threads of XLA: a device may wait in several collectives at once, and with two all would wait
        "XLA_FLAGS": "--xla_force_host_platform_device_count=2",
        "PYTHONPATH": str(REPOSITORY),
    }
    command = [sys.executable, "-c", RUN_AND_RESUME, axis, str(tmp_path / "run")]
    result = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=900)
    assert result.returncode == 0, result.stdout[-500:] + result.stderr[-3000:]
    assert "resumed as it was" in result.stdout
