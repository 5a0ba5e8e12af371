"""What every test runs under. Environment variables, so that a test that needs no jax does not import it.

They are set before any test module is imported, and processes that a test starts inherit them.
"""

import os

import pytest

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
