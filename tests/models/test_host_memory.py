"""What loading and saving weights hold on the host beside the parameters themselves, in a process of its own.

On CPU devices the parameters lie in the memory of the host too; what is bounded is the peak beyond them.
"""

import json
import os
import pathlib
import subprocess
import sys

import pytest

from orchestra_jax.models import huggingface

PEAK = pathlib.Path("/proc/self/clear_refs")  # Linux: a 5 written here starts the peak of resident memory anew

MEASURE = """
import json, pathlib, sys
import jax, jax.numpy as jnp, numpy as np
from orchestra_jax import sharding
from orchestra_jax.models import huggingface
from orchestra_jax.models.config import ModelConfig
from orchestra_jax.models.transformer import Transformer, init_params

directory, mesh_sizes = pathlib.Path(sys.argv[1]), json.loads(sys.argv[2])
# 190 MB of bfloat16: 12 layers of three matrices of 4 MiB and smaller ones, and two of 8 MiB.
model = Transformer(ModelConfig(8192, 512, 4096, 12, 8, 4, 64, is_tied=False, parameter_dtype="bfloat16"))
shapes = jax.eval_shape(lambda: init_params(model.config, jax.random.key(0)))
params_bytes = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(shapes))
mesh = sharding.make_mesh(mesh_sizes) if mesh_sizes else None

def resident_bytes(name):
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))

def peak_beyond(function):
    "What the process holds at most while the function runs, beyond what it held before; its result."
    pathlib.Path("/proc/self/clear_refs").write_text("5")
    before = resident_bytes("VmRSS")
    result = function()
    return resident_bytes("VmHWM") - before, result

def save(name):
    huggingface.save_pretrained(model, params, directory / name, max_shard_bytes=24 * 10**6)

# Each once before it is measured: programs are compiled, and stay.
params = jax.block_until_ready(jax.tree.map(lambda leaf: jnp.full(leaf.shape, 0.5, leaf.dtype), shapes))
save("warm")
saving_bytes, _ = peak_beyond(lambda: save("measured"))
del params
huggingface.load_pretrained(directory / "warm", mesh)
load = lambda: huggingface.load_pretrained(directory / "measured", mesh)
loading_bytes, (_, loaded) = peak_beyond(load)
assert all(float(leaf.min()) == float(leaf.max()) == 0.5 for leaf in jax.tree.leaves(loaded))
file_bytes = [file.stat().st_size for file in (directory / "measured").glob("*.safetensors")]
print(json.dumps({
    "params": params_bytes, "files": len(file_bytes), "file": max(file_bytes),
    "tensor": max(leaf.nbytes for leaf in (loaded["embedding"], loaded["head"])),
    "saving": saving_bytes, "loading": loading_bytes - params_bytes,
}))
"""


@pytest.mark.slow
@pytest.mark.skipif(not PEAK.exists(), reason="Linux tells the peak of resident memory")
@pytest.mark.parametrize("mesh_sizes", [{}, {"fsdp": 2, "tensor": 2}])
def test_the_host_holds_one_file_and_one_tensor_beside_the_parameters(mesh_sizes, tmp_path):
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={4 if mesh_sizes else 1}",
        "PYTHONPATH": str(pathlib.Path(huggingface.__file__).parents[2]),
        # Whatever is freed goes back to the system, else the allocator's hoard is measured. Bytes.
        "MALLOC_MMAP_THRESHOLD_": "65536",
        "MALLOC_TRIM_THRESHOLD_": "65536",
    }
    command = [sys.executable, "-c", MEASURE, str(tmp_path), json.dumps(mesh_sizes)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr[-3000:]
    figures = json.loads(result.stdout)
    print(figures)
    assert figures["files"] > 6
    assert figures["loading"] < figures["file"] + figures["tensor"] < figures["params"] / 4
    # A tensor is there twice while it is transposed, beside a shard that is full.
    assert figures["saving"] < figures["file"] + 2 * figures["tensor"] < figures["params"] / 4
