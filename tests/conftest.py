"""What every test runs under. Environment variables, so that a test that needs no jax does not import it.

They are set before any test module is imported, and processes that a test starts inherit them.
"""

import gc
import os
import pathlib
import signal
import sys

import pytest

MEMORY_MAPS = pathlib.Path("/proc/self/maps")  # Linux
MOST_MEMORY_MAPS = 25_000

# A shell has what it starts in the background ignore Ctrl-C, which tests press.
signal.signal(signal.SIGINT, signal.default_int_handler)
os.environ["JAX_NUMPY_RANK_PROMOTION"] = "raise"
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")  # tests compile much and compute little
os.environ["MPLBACKEND"] = "Agg"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_OFFLINE"] = "1"


@pytest.fixture(scope="session")
def components():
    """The parts of a default run over few tasks."""
    from orchestra_jax.components import build_components
    from orchestra_jax.config import DataConfig, RunConfig

    made = build_components(RunConfig(data=DataConfig(num_tasks_per_cell=10, num_test_tasks_per_cell=8)))
    yield made
    made.resources.close()


@pytest.fixture(autouse=True, scope="module")
def few_memory_maps():
    """XLA maps memory for each program that it compiles; at 65,530 maps, Linux's limit of a process, it aborts."""
    yield
    if "jax" in sys.modules and MEMORY_MAPS.exists() and MEMORY_MAPS.read_bytes().count(b"\n") > MOST_MEMORY_MAPS:
        sys.modules["jax"].clear_caches()
        gc.collect()
