"""Checkpoints: bitwise round trips, atomicity, what is kept."""

import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from orchestra_jax.checkpoints import Checkpointer


def make_state():
    params = {
        "kernel": jax.random.normal(jax.random.key(0), (3, 4)),
        "scale": (jnp.arange(5) / 7).astype(jnp.bfloat16),
    }
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3))
    optimizer_state = optimizer.init(params)
    updates, optimizer_state = optimizer.update(jax.tree.map(jnp.ones_like, params), optimizer_state, params)
    return {"params": optax.apply_updates(params, updates), "optimizer": optimizer_state, "step": jnp.int32(1)}


def abstract(state):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)


def assert_bitwise_equal(left, right):
    assert jax.tree.structure(left) == jax.tree.structure(right)
    for a, b in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        assert a.dtype == b.dtype and a.sharding == b.sharding
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


def test_round_trip_is_bitwise_with_optimizer_and_host_state(tmp_path):
    state = make_state()
    host_state = {"seed": 7, "counters": [1, 2], "iterator": b'{"next": 3}\xff', "nested": {"x": 0.1, "none": None}}
    with Checkpointer(tmp_path / "new" / "checkpoints", max_to_keep=2) as checkpointer:
        assert checkpointer.latest_step() is None
        checkpointer.save(1, state, host_state)
        host_state["counters"].append(3)  # the save runs in the background and must not see this
    with Checkpointer(tmp_path / "new" / "checkpoints", max_to_keep=2) as checkpointer:
        assert checkpointer.latest_step() == 1
        restored, restored_host = checkpointer.restore(1, abstract(state))
    assert_bitwise_equal(restored, state)
    assert restored_host == {
        "seed": 7,
        "counters": [1, 2],
        "iterator": b'{"next": 3}\xff',
        "nested": {"x": 0.1, "none": None},
    }


def test_arrays_donated_after_the_save_are_saved_as_they_were(tmp_path):
    add_one = jax.jit(lambda x: x + 1, donate_argnums=0)
    state = {"x": jnp.zeros(1000)}
    with Checkpointer(tmp_path, max_to_keep=1) as checkpointer:
        checkpointer.save(1, state, {})
        shape = abstract(state)
        add_one(state["x"]).block_until_ready()
        restored, _ = checkpointer.restore(1, shape)
    np.testing.assert_array_equal(restored["x"], np.zeros(1000))


def test_only_the_newest_are_kept(tmp_path):
    with Checkpointer(tmp_path, max_to_keep=2) as checkpointer:
        for step in (1, 2, 3):
            checkpointer.save(step, {"x": jnp.full(2, step)}, {"step": step})
        assert checkpointer.latest_step() == 3
        with pytest.raises(ValueError, match=r"step 1 .*finished steps are \[2, 3\]"):
            checkpointer.restore(1, {"x": jax.ShapeDtypeStruct((2,), jnp.int32)})
        _, host_state = checkpointer.restore(2, {"x": jax.ShapeDtypeStruct((2,), jnp.int32)})
        assert host_state == {"step": 2}


def test_half_written_steps_are_ignored(tmp_path):
    with Checkpointer(tmp_path, max_to_keep=3) as checkpointer:
        checkpointer.save(4, {"x": jnp.zeros(2)}, {})
    (tmp_path / "5.orbax-checkpoint-tmp" / "state").mkdir(parents=True)  # what a killed save leaves
    (tmp_path / "3").mkdir()  # what a killed deletion leaves
    with Checkpointer(tmp_path, max_to_keep=3) as checkpointer:
        assert checkpointer.latest_step() == 4
        checkpointer.save(5, {"x": jnp.ones(2)}, {})
        assert checkpointer.latest_step() == 5


KILLED_AT_THE_RENAME = """
import os, sys
import jax.numpy as jnp
from orchestra_jax.checkpoints import Checkpointer

checkpointer = Checkpointer(sys.argv[1], max_to_keep=1)
checkpointer.save(1, {"x": jnp.zeros(2)}, {"step": 1})
assert checkpointer.latest_step() == 1
os.rename = os.replace = lambda *_, **__: os._exit(9)
checkpointer.save(2, {"x": jnp.ones(2)}, {"step": 2})
checkpointer.close()
"""


def test_a_process_killed_before_the_last_rename_leaves_the_old_step(tmp_path):
    killed = subprocess.run([sys.executable, "-c", KILLED_AT_THE_RENAME, tmp_path], capture_output=True, text=True)
    assert killed.returncode == 9, killed.stderr
    assert [path.name for path in tmp_path.glob("2*")] == ["2.orbax-checkpoint-tmp"]
    with Checkpointer(tmp_path, max_to_keep=1) as checkpointer:
        assert checkpointer.latest_step() == 1
        restored, host_state = checkpointer.restore(1, {"x": jax.ShapeDtypeStruct((2,), jnp.float32)})
    np.testing.assert_array_equal(restored["x"], [0, 0])
    assert host_state == {"step": 1}


def test_an_unfinished_newest_step_is_refused(tmp_path):
    (tmp_path / "7").mkdir()  # a copy cut short: no save leaves this name behind
    with pytest.raises(ValueError, match="7 is not a finished checkpoint"):
        Checkpointer(tmp_path, max_to_keep=1)


def test_user_mistakes_name_the_value(tmp_path):
    with pytest.raises(ValueError, match="max_to_keep is 0"):
        Checkpointer(tmp_path, max_to_keep=0)
    with Checkpointer(tmp_path, max_to_keep=1) as checkpointer:
        with pytest.raises(ValueError, match=r"host_state\['a'\]\[1\] is a ndarray"):
            checkpointer.save(2, {"x": jnp.zeros(2)}, {"a": [1, np.zeros(2)]})
        with pytest.raises(ValueError, match="has the key 3"):
            checkpointer.save(2, {"x": jnp.zeros(2)}, {"a": {3: 1}})
        checkpointer.save(2, {"x": jnp.zeros(2)}, {})
        with pytest.raises(ValueError, match="cannot save step 2"):
            checkpointer.save(2, {"x": jnp.zeros(2)}, {})
        with pytest.raises(ValueError, match="does not fit this model"):
            checkpointer.restore(2, {"x": jax.ShapeDtypeStruct((3,), jnp.float32)})
        with pytest.raises(ValueError, match="does not fit this model"):
            checkpointer.restore(2, {"y": jax.ShapeDtypeStruct((2,), jnp.float32)})
