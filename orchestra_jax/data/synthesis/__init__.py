"""Synthesis of function-calling tasks: a description of a domain in, a domain and its tasks out (pipeline.py)."""

from orchestra_jax.data.synthesis.pipeline import SynthesisConfig as SynthesisConfig
from orchestra_jax.data.synthesis.pipeline import generate_samples as generate_samples
