"""An engine over local servers, with limits that tests can wait for."""

import asyncio

import pytest

from orchestra_jax.generation.sglang_engine import SGLangConfig, SGLangEngine
from tests.generation.sglang.servers import VOCAB_SIZE, ProtocolServer


def write_label(params, directory):
    """The weights of these tests are a text."""
    (directory / "model.safetensors").write_bytes(str(params).encode())
    return not str(params).startswith("delta")


@pytest.fixture
def make_engine(tmp_path):
    def make(*urls, version=1, **settings):
        config = SGLangConfig(
            urls=urls, weights_directory=str(tmp_path / "weights"), context_length=1000,
            **{"attempt_timeout_s": 5.0, "timeout_s": 10.0, "first_wait_s": 0.02, "max_attempts": 4, **settings},
        )  # fmt: skip
        engine = SGLangEngine(config, VOCAB_SIZE, write_label)
        if version is not None:
            asyncio.run(engine.update_weights("first", version))
        return engine

    return make


@pytest.fixture
def server():
    with ProtocolServer() as server:
        yield server
