"""Has a model describe the experts of the catalog, for `--config.experts.descriptions_path`.

    python -m experiments.describe_experts --endpoints=endpoints.json --writer=gpt-5 --output=descriptions.json \\
        --spend_cap_usd=1

`endpoints.json` is what `--config.experts.endpoints_path` takes; experts without an endpoint are the simulated ones.
With `--pool=TRAINING`, say, the models of that pool of configs/catalog.py are described.
"""

import asyncio
import json
import pathlib
import sys

from absl import app, flags

_ENDPOINTS = flags.DEFINE_string("endpoints", None, "Endpoints by model, JSON.", required=True)
_WRITER = flags.DEFINE_string("writer", None, "The model with an endpoint that writes.", required=True)
_OUTPUT = flags.DEFINE_string("output", None, "The JSON file to write: descriptions by model.", required=True)
_POOL = flags.DEFINE_string("pool", "", "A pool of configs/catalog.py; empty: the experts of the quickstart.")
_NUM_TASKS = flags.DEFINE_integer("num_tasks", 10, "Tasks that each expert is given.")
_SEED = flags.DEFINE_integer("seed", 0, "Of the sampled tasks.")
_RECORDING = flags.DEFINE_string("recording_directory", "", "Replies are recorded there; empty: they are not.")
_MODE = flags.DEFINE_string("recording_mode", "record", 'Or "replay": nobody is asked.')
_CAP = flags.DEFINE_float("spend_cap_usd", 0.0, "Real money that this may spend.")


def main(_):
    try:
        descriptions = asyncio.run(describe_all())
    except ValueError as error:
        print(f"describe_experts: {error}", file=sys.stderr)
        sys.exit(2)
    pathlib.Path(_OUTPUT.value).write_text(json.dumps(descriptions, indent=1, ensure_ascii=False) + "\n")


async def describe_all() -> dict[str, str]:
    from configs import catalog
    from orchestra_jax.data.questions import build_tasks
    from orchestra_jax.data.records import Offer
    from orchestra_jax.experts.catalog import Pool
    from orchestra_jax.experts.descriptions import describe
    from orchestra_jax.experts.endpoint import load_endpoints
    from orchestra_jax.experts.replay import RecordedExpert
    from orchestra_jax.experts.simulated import SimulatedExperts
    from orchestra_jax.experts.world import WorldConfig, expert_names, model_names
    from orchestra_jax.tools.budget import Account
    from orchestra_jax.tools.recording import Store

    pools = {name: value for name, value in vars(catalog).items() if isinstance(value, Pool)}
    if _POOL.value and _POOL.value not in pools:
        raise ValueError(f"the pool {_POOL.value!r} is not one of {sorted(pools)}")
    pool = pools.get(_POOL.value, Pool())
    world = WorldConfig(training_pool=pool, evaluation_pool=pool)
    account = Account(_CAP.value)
    store = Store(_RECORDING.value, _MODE.value) if _RECORDING.value else None
    is_offline = store is not None and store.is_replay
    endpoints = load_endpoints(_ENDPOINTS.value, model_names(world), account, is_offline)
    if store is not None:
        endpoints = {model: RecordedExpert(endpoint, store) for model, endpoint in endpoints.items()}
    if _WRITER.value not in endpoints:
        raise ValueError(f"the writer {_WRITER.value!r} has no endpoint: choose one of {sorted(endpoints)}")
    simulated = SimulatedExperts(world)
    tasks = build_tasks("train", 20, _SEED.value)
    descriptions = {}
    for alias, model in zip(expert_names(world), model_names(world)):
        offer = Offer(alias, model, False, 0.0, 0.0, 1.0)
        expert, writer = endpoints.get(model, simulated), endpoints[_WRITER.value]
        made = await describe(offer, expert, tasks, writer, _SEED.value, _NUM_TASKS.value)
        descriptions[model] = made.text
        print(f"{model}: {made.num_solved} of {made.num_tasks} right, ${account.spent_usd:.4f} spent so far")
    for endpoint in endpoints.values():
        await endpoint.close()
    return descriptions


if __name__ == "__main__":
    app.run(main)
