"""Options of the compiler: those that this XLA knows are told, others left out."""

import jax
import jax.numpy as jnp
import pytest

from orchestra_jax.models import compilation


@pytest.fixture
def options(monkeypatch):
    """COMPILER_OPTIONS of this test alone."""
    own = {}
    monkeypatch.setattr(compilation, "COMPILER_OPTIONS", {jax.default_backend(): own})
    compilation.compiler_options.cache_clear()
    yield own
    compilation.compiler_options.cache_clear()


def test_an_option_that_xla_does_not_know_is_left_out(options):
    options.update({"xla_llvm_disable_expensive_passes": True, "xla_option_of_another_version": True})
    assert compilation.compiler_options(jax.default_backend()) == {"xla_llvm_disable_expensive_passes": True}
    assert compilation.jit(lambda x: x + 1)(jnp.ones(2)).tolist() == [2.0, 2.0]


def test_a_value_that_xla_refuses_is_an_error(options):
    options["xla_llvm_disable_expensive_passes"] = "perhaps"
    with pytest.raises(jax.errors.JaxRuntimeError, match="perhaps"):
        compilation.jit(lambda x: x + 1)(jnp.ones(2))


def test_a_platform_without_options_has_none(options):
    assert compilation.compiler_options("a platform of its own") == {}
