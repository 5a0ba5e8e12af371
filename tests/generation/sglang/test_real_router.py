"""Through a real sglang-router before two real servers: turns by the router, control by the servers themselves."""

import asyncio
import os
import subprocess

import numpy as np
import pytest

from orchestra_jax.generation.engine import Sampling
from orchestra_jax.types import StopReason
from tests.generation.sglang.real_servers import ROOT, ask, gaps, roll_out, start_turns, wait_for
from tests.ports import free_port

pytestmark = pytest.mark.sglang

SHIM = ROOT / "orchestra_jax" / "assets" / "sglang_cpu" / "shim"
LAUNCH = "import torchvision_schemas; from sglang_router.launch_router import main; main()"


@pytest.fixture(scope="module")
def router_url(server_python, served, tmp_path_factory):
    log_path = tmp_path_factory.mktemp("router") / "router.log"
    url = f"http://127.0.0.1:{free_port()}"
    command = [
        server_python, "-c", LAUNCH, "--host", "127.0.0.1", "--port", url.rpartition(":")[2], "--policy", "manual",
        "--worker-urls", *served.urls, "--prometheus-port", str(free_port()), "--disable-retries",
    ]  # fmt: skip
    with open(log_path, "wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env={**os.environ, "PYTHONPATH": str(SHIM)})
    try:
        wait_for(lambda: num_healthy(url) == 2 or process.poll() is not None, 120.0, "router")
        assert process.poll() is None, log_path.read_text()
        yield url
    finally:
        process.kill()
        process.wait()


def num_healthy(url):
    try:
        return sum(worker["is_healthy"] for worker in ask(url, "/workers")["workers"])
    except (OSError, ValueError):
        return 0


def num_generated(served):
    return np.array([served.num_generated(url) for url in served.urls])


def test_turns_through_a_router_are_exact_and_reach_both_servers(served, router_url, model_config, params):
    engine = served.engine(router_url=router_url)
    asyncio.run(engine.update_weights(params, 1))
    before = num_generated(served)
    completions = roll_out(engine, model_config, 16, 16)
    assert gaps(model_config, params, completions).max() <= 1e-3
    assert all((each.policy_versions == 1).all() for each in completions.values())
    counts = num_generated(served) - before
    print(f"16 sessions through a router: {counts} on the two servers")
    assert counts.sum() == 16 and counts.min() > 0


def test_a_router_keeps_a_session_on_its_server(served, router_url, params):
    engine = served.engine(router_url=router_url)
    asyncio.run(engine.update_weights(params, 2))
    before = num_generated(served)

    async def run():
        for n in range(6):
            asked = Sampling(1.0, 4, frozenset(), 0)
            await engine.generate([5 + n], asked, request_id=f"{n}", session_id="one")

    asyncio.run(run())
    assert sorted(num_generated(served) - before) == [0, 6]


def test_streams_and_aborts_pass_through_a_router(served, router_url, model_config, params):
    engine = served.engine(router_url=router_url)
    asyncio.run(engine.update_weights(params, 3))

    async def run():
        turns = start_turns(engine, 2, 300)
        await turns[0].begun.wait()  # a stream, told of while it goes on
        assert not turns[0].done()
        await engine.abort("0")
        return await asyncio.gather(*turns)

    aborted, other = asyncio.run(run())
    assert aborted.stop_reason == StopReason.ABORTED and 20 <= len(aborted.tokens) < 300
    assert other.stop_reason == StopReason.LENGTH and len(other.tokens) == 300
    assert gaps(model_config, params, {(5,): aborted, (6,): other}).max() <= 1e-3
