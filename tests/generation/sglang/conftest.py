"""An engine over local servers, with limits that tests can wait for; two real servers for the tests marked `sglang`."""

import asyncio
import hashlib
import os
import pathlib

import pytest

from orchestra_jax.generation.sglang_engine import SGLangConfig, SGLangEngine
from tests.generation.sglang.servers import VOCAB_SIZE, ProtocolServer

RECIPE = pathlib.Path(__file__).parents[3] / "orchestra_jax" / "assets" / "sglang_cpu" / "install.sh"


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


@pytest.fixture(scope="session")
def server_python():
    if named := os.environ.get("SGLANG_PYTHON"):
        assert os.access(named, os.X_OK), f"SGLANG_PYTHON={named} names no interpreter"
        return named
    name = f"sglang_cpu_{hashlib.sha256(RECIPE.read_bytes()).hexdigest()[:12]}"
    cache = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache")
    python = str(cache / "orchestra_jax" / name / "bin" / "python")
    if not os.access(python, os.X_OK):
        pytest.skip(f"no environment of a server at {python}: run {RECIPE}")
    return python


@pytest.fixture(scope="session")
def served(server_python, tmp_path_factory):
    from tests.generation.sglang.real_servers import Served

    servers = Served(server_python, tmp_path_factory.mktemp("served"), 2, "float32").wait()
    yield servers
    servers.close()


@pytest.fixture(scope="session")
def model_config(served):
    from tests.generation.sglang.real_servers import served_model_config

    return served_model_config(served.config)


@pytest.fixture(scope="session")
def params(model_config):
    import jax

    from orchestra_jax.models.transformer import init_params
    from tests.generation.sglang.real_servers import sharpened

    return sharpened(init_params(model_config, jax.random.key(0)))
