"""What every test runs under. Environment variables, so that a test that needs no jax does not import it.

They are set before any test module is imported, and processes that a test starts inherit them.
"""

import os

os.environ["JAX_NUMPY_RANK_PROMOTION"] = "raise"
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")  # tests compile much and compute little
os.environ["MPLBACKEND"] = "Agg"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_OFFLINE"] = "1"
