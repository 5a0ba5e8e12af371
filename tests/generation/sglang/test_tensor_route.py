"""Weights that travel within requests: what the server reads, and that its session is always closed."""

import asyncio
import functools
import io

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from orchestra_jax.generation.sglang import weight_sync
from orchestra_jax.generation.sglang.tensor_payload import tensor_payloads
from orchestra_jax.generation.sglang_engine import EngineUnavailable
from tests.generation.sglang.servers import TensorReader

SESSION = ["/begin_weight_update", "/update_weights_from_tensor", "/end_weight_update"]


def weights(seed, dtype=np.float32):
    rng = np.random.default_rng(seed)
    shapes = {"norm.weight": (5,), "layers.0.up.weight": (3, 4), "cube": (2, 3, 4)}
    return {name: rng.normal(size=shape).astype(dtype) for name, shape in shapes.items()}


@pytest.fixture
def make_tensor_engine(make_engine):
    def make(url, params, **settings):
        engine = make_engine(url, version=None, weight_route="tensor", **settings)
        engine._write_weights = lambda params, directory: save_file(params, directory / "model.safetensors") is None
        asyncio.run(engine.update_weights(params, 1))
        return engine

    return make


def assert_same(loaded, params):
    assert set(loaded) == set(params)
    for name, array in params.items():
        np.testing.assert_array_equal(loaded[name], array)
        assert loaded[name].dtype == array.dtype


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_the_server_reads_the_arrays_that_were_written(make_tensor_engine, server, dtype):
    server.num_ranks = 2
    engine = make_tensor_engine(server.url, weights(1, dtype))
    server.events.clear()
    asyncio.run(engine.update_weights(weights(2, dtype), 2))
    assert server.events == ["/pause_generation", "/server_info", *SESSION, "/continue_generation", "/model_info"]
    assert (server.label, server.is_paused, server.is_session_open) == ("2", False, False)
    for version, params in ((1, weights(1, dtype)), (2, weights(2, dtype))):
        label, loaded = server.loaded[version - 1]
        assert label == str(version)
        assert_same(loaded, params)


def test_a_server_of_before_the_sessions_is_sent_none(make_tensor_engine, server):
    server.has_sessions = False
    make_tensor_engine(server.url, weights(1))
    assert server.label == "1" and "/end_weight_update" not in server.events


def test_a_session_that_a_killed_trainer_left_open_is_ended(make_tensor_engine, server):
    server.is_session_open = True
    make_tensor_engine(server.url, weights(1))
    assert server.label == "1" and not server.is_session_open
    asked = [event for event in server.events if event in SESSION]
    assert asked == ["/begin_weight_update", "/end_weight_update", *SESSION]


def test_a_failed_update_closes_the_session_and_ends_the_pause(make_tensor_engine, server):
    engine = make_tensor_engine(server.url, weights(1), sync_timeout_s=0.3)
    server.fail_update = True
    with pytest.raises(EngineUnavailable, match="no server took the weights of version 2: .*no session"):
        asyncio.run(engine.update_weights(weights(2), 2))
    assert server.label == "1" and not server.is_session_open and not server.is_paused


def test_updated_but_not_flushed_is_mended(make_tensor_engine, server):
    engine = make_tensor_engine(server.url, weights(1))
    server.is_busy = True
    asyncio.run(engine.update_weights(weights(2), 2))
    assert server.label == "2" and not server.is_busy and not server.is_session_open


def test_much_travels_in_buckets_and_the_last_brings_the_version(make_tensor_engine, server, monkeypatch):
    monkeypatch.setattr(weight_sync, "tensor_payloads", functools.partial(tensor_payloads, bucket_bytes=100))
    make_tensor_engine(server.url, weights(1))  # 96, 48 and 20 bytes
    assert [(label, sorted(loaded)) for label, loaded in server.loaded] == [
        (None, ["cube"]), ("1", ["layers.0.up.weight", "norm.weight"]),
    ]  # fmt: skip
    assert_same({**server.loaded[0][1], **server.loaded[1][1]}, weights(1))


def test_a_file_of_other_dtypes_is_refused(tmp_path):
    save_file({"counts": np.arange(3)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="counts is I64; weights are sent in one of"):
        next(tensor_payloads(tmp_path / "model.safetensors"))


@pytest.mark.parity
@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_torch_reads_the_same(tmp_path, dtype):
    """As SGLang's own unpickler does: storages by the loader that takes weights alone."""
    torch = pytest.importorskip("torch")

    class Reader(TensorReader):
        def find_class(self, module, name):
            known = {
                ("torch.storage", "_load_from_bytes"): lambda data: torch.load(io.BytesIO(data), weights_only=True),
                ("torch._utils", "_rebuild_tensor_v2"): torch._utils._rebuild_tensor_v2,
            }
            return known.get((module, name)) or super().find_class(module, name)

    params = {**weights(1, dtype), "scalar": np.array(1.5, dtype)}
    save_file(params, tmp_path / "model.safetensors")
    (payload,) = tensor_payloads(tmp_path / "model.safetensors")
    loaded = dict(Reader(io.BytesIO(payload)).load())
    assert_same({name: each.float().numpy().astype(dtype) for name, each in loaded.items()}, params)
    assert all(each.is_contiguous() for each in loaded.values())
