"""New weights into servers: every server verified before the next token counts, nothing left paused or lying about."""

import asyncio
import pathlib
import subprocess
import sys
import time

import pytest

from orchestra_jax.generation.sglang.weight_directory import (
    pin_whole_version,
    remove_others,
    unpin,
    whole_version,
    write_version,
)
from orchestra_jax.generation.sglang_engine import EngineUnavailable
from tests.generation.sglang.servers import FaultProxy, ProtocolServer, generate, rollout, sampling


def names(directory):
    return sorted(path.name for path in directory.iterdir())


def test_each_update_pauses_loads_verifies_and_goes_on(make_engine, server, tmp_path):
    engine = make_engine(server.url, version=0)
    server.events.clear()
    asyncio.run(engine.update_weights("second", 1))
    assert server.events == [
        "/pause_generation", "/update_weights_from_disk", "/continue_generation", "/model_info",
    ]  # fmt: skip
    assert (server.label, server.is_paused, server.pause_mode) == ("1", False, "retract")
    assert server.loaded == [("v000000", b"first"), ("v000001", b"second")]
    assert names(tmp_path / "weights") == ["v000001", "whole"]  # the old version is gone
    assert generate(engine, [1, 2], sampling(3, stop_ids=())).tokens.tolist() == rollout([1, 2], 1, 3)


def test_only_what_differs_travels_and_a_restarted_server_gets_both(make_engine, tmp_path):
    with ProtocolServer() as server:
        engine = make_engine(server.url, version=5)
        for version in (6, 7):
            asyncio.run(engine.update_weights(f"delta {version}", version))
        assert server.loaded == [("v000005", b"first"), ("v000006", b"delta 6"), ("v000007", b"delta 7")]
        assert names(tmp_path / "weights") == ["v000005", "v000007", "whole"]
        assert whole_version(tmp_path / "weights").name == "v000005"
        server.label, server.loaded = "5", []  # restarted from the whole version
        generate(engine, [1, 2])
        assert server.loaded == [("v000007", b"delta 7")] and server.label == "7"
        server.label, server.loaded = "default", []
        generate(engine, [1, 2])
        assert server.loaded == [("v000005", b"first"), ("v000007", b"delta 7")]
        server.label, server.loaded = "default", []  # and nobody has noticed
        asyncio.run(engine.update_weights("delta 8", 8))
        assert server.loaded == [("v000005", b"first"), ("v000008", b"delta 8")]


def test_turns_under_way_keep_their_tokens_and_go_on_with_the_new_weights(make_engine):
    with ProtocolServer(token_s=0.1) as server:
        engine = make_engine(server.url, version=1)

        async def run():
            turn = asyncio.ensure_future(
                engine.generate([1, 2], sampling(10, stop_ids=()), request_id="r", session_id="s")
            )
            await asyncio.sleep(0.35)
            await engine.update_weights("second", 2)
            return await turn

        completion = asyncio.run(run())
    num_old = int((completion.policy_versions == 1).sum())
    assert completion.policy_versions.tolist() == [1] * num_old + [2] * (10 - num_old) and 1 <= num_old < 10
    old = rollout([1, 2], 1, num_old)
    assert completion.tokens.tolist() == old + rollout([1, 2, *old], 2, 10 - num_old)


def test_updated_but_not_flushed_is_mended(make_engine, server):
    engine = make_engine(server.url, version=1)
    server.is_busy = True
    asyncio.run(engine.update_weights("second", 2))
    assert server.label == "2" and not server.is_busy and not server.is_paused
    assert server.events.index("/flush_cache") < server.events.index("/update_weight_version")


@pytest.mark.parametrize("fault", ["500", "reset", "garbage"])
def test_a_sync_that_fails_once_is_repeated_and_never_left_paused(make_engine, server, fault):
    def inject(path, number):
        return fault if path == "/update_weights_from_disk" and number == 2 else "pass"

    with FaultProxy(server.url, inject) as proxy:
        engine = make_engine(proxy.url, version=1)
        asyncio.run(engine.update_weights("second", 2))
    assert server.label == "2" and not server.is_paused


def test_a_pause_whose_answer_is_lost_is_continued(make_engine, server):
    class LosesPause(FaultProxy):
        async def handle(self, request):
            answer = await super().handle(request)
            if request.path == "/pause_generation" and self.counts["/pause_generation"] == 2:
                request.transport.abort()
            return answer

    with LosesPause(server.url, lambda path, number: "pass") as proxy:
        engine = make_engine(proxy.url, version=1)
        asyncio.run(engine.update_weights("second", 2))
    assert server.label == "2" and not server.is_paused


def test_no_server_in_time_stops_the_run_with_the_reasons(make_engine, server):
    engine = make_engine(server.url, version=1, sync_timeout_s=0.3)
    server.fail_update = True
    with pytest.raises(EngineUnavailable, match="no server took the weights of version 2: .*no weights"):
        asyncio.run(engine.update_weights("second", 2))
    assert not server.is_paused


def test_a_server_that_says_yes_and_keeps_its_version_is_not_believed(make_engine, server):
    engine = make_engine(server.url, version=1, sync_timeout_s=0.3)
    server.leave_stale = True
    with pytest.raises(EngineUnavailable, match="has weights '1' behind an update to 2"):
        asyncio.run(engine.update_weights("second", 2))


def test_one_dead_server_does_not_hold_the_others_up(make_engine):
    with ProtocolServer() as one:
        with ProtocolServer() as two:
            engine = make_engine(one.url, two.url, version=1)
        asyncio.run(engine.update_weights("second", 2))
        assert one.label == "2"
        assert generate(engine, [1, 2], sampling(3, stop_ids=())).policy_versions.tolist() == [2] * 3


def test_a_trainer_that_raises_while_it_writes_pauses_nobody(make_engine, server, tmp_path):
    engine = make_engine(server.url, version=1)

    def fail(params, directory):
        (directory / "model.safetensors").write_bytes(b"half")
        raise RuntimeError("out of device memory")

    engine._write_weights = fail
    with pytest.raises(RuntimeError, match="out of device memory"):
        asyncio.run(engine.update_weights("second", 2))
    assert not server.is_paused and server.label == "1" and names(tmp_path / "weights") == ["v000001", "whole"]


def test_a_trainer_that_is_cancelled_in_the_sync_lets_the_server_go_on(make_engine, server):
    with FaultProxy(server.url, lambda path, number: "hang" if number == 2 and "update_w" in path else "pass") as proxy:
        engine = make_engine(proxy.url, version=1)

        async def run():
            task = asyncio.ensure_future(engine.update_weights("second", 2))
            while not server.is_paused:
                await asyncio.sleep(0.01)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task

        asyncio.run(run())
        assert not server.is_paused


SYNC_FOREVER = """
import asyncio, pathlib, sys
from orchestra_jax.generation.sglang.connection import Connection, Sessions
from orchestra_jax.generation.sglang.weight_directory import write_version
from orchestra_jax.generation.sglang.weight_sync import send_weights

async def run(url, root):
    path, _ = write_version(root, 2, lambda directory: bool((directory / "model.safetensors").write_bytes(b"w")))
    await send_weights(Connection(url, Sessions()), [path], 2, 60.0)

asyncio.run(run(sys.argv[1], pathlib.Path(sys.argv[2])))
"""


def test_a_trainer_killed_in_the_sync_leaves_the_server_usable(make_engine, server, tmp_path):
    """Its successor's first sync ends the pause and removes what was left behind."""
    with FaultProxy(server.url, lambda path, number: "hang" if "update_w" in path else "pass") as proxy:
        command = [sys.executable, "-c", SYNC_FOREVER, proxy.url, str(tmp_path / "weights")]
        trainer = subprocess.Popen(command, cwd=pathlib.Path(__file__).parents[3])
        while not server.is_paused:
            assert trainer.poll() is None
            time.sleep(0.01)
        trainer.kill()
        trainer.wait()
    assert server.is_paused
    (tmp_path / "weights" / ".writing-123").mkdir()
    engine = make_engine(server.url, version=3)
    assert not server.is_paused and names(tmp_path / "weights") == ["v000003", "whole"]
    assert generate(engine, [1, 2], sampling(2)).policy_versions.tolist() == [3, 3]


def test_colocated_servers_lend_their_memory_between_rollouts_and_the_next_weights(make_engine, server):
    engine = make_engine(server.url, version=1, is_colocated=True)
    asyncio.run(engine.release_memory())
    assert server.is_released
    server.events.clear()
    asyncio.run(engine.update_weights("second", 2))
    assert not server.is_released
    assert server.events == [
        "/resume_memory_occupation", "/pause_generation", "/update_weights_from_disk",
        "/resume_memory_occupation", "/continue_generation", "/model_info",
    ]  # fmt: skip
    asyncio.run(make_engine(server.url, version=3).release_memory())
    assert not server.is_released  # servers of their own keep theirs


def test_a_server_that_starts_keeps_its_files_while_newer_versions_come(tmp_path):
    def write(version, text):
        return write_version(tmp_path, version, lambda path: bool((path / "model.safetensors").write_text(text)))[0]

    assert pin_whole_version(tmp_path, "30000") is None
    write(1, "a")
    pinned, version = pin_whole_version(tmp_path, "30000")
    newer = write(2, "b")
    remove_others(tmp_path, [newer])
    assert version == 1 and (pinned / "model.safetensors").read_text() == "a"
    pinned, version = pin_whole_version(tmp_path, "30000")
    assert version == 2 and (pinned / "model.safetensors").read_text() == "b"
    unpin(pinned)
    assert names(tmp_path) == ["v000002", "whole"] and (newer / "model.safetensors").read_text() == "b"


def test_versions_appear_whole_and_replace_what_bore_their_name(tmp_path):
    def writer(text, is_whole=True):
        return lambda directory: bool((directory / "model.safetensors").write_text(text)) and is_whole

    first, is_whole = write_version(tmp_path, 1, writer("a"))
    assert is_whole and whole_version(tmp_path) == first and first.name == "v000001"
    second, is_whole = write_version(tmp_path, 2, writer("b", False))
    assert not is_whole and whole_version(tmp_path) == first
    again, _ = write_version(tmp_path, 1, writer("c"))
    assert (again / "model.safetensors").read_text() == "c" and names(tmp_path) == ["v000001", "v000002", "whole"]
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="cannot write weights to .*file"):
        write_version(tmp_path / "file", 1, writer("d"))
