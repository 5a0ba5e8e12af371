"""Function-calling tasks for an orchestrator of 1M parameters, trained from nothing on two CPU cores.

    python -m experiments.train --config=configs/quickstart_functions.py --workdir=runs/quickstart_functions

Wishes of one to three lines at the desk of the library, on 8 databases; held-out tasks on 8 others. The warm start
shows a clerk who handles the lines in order and guesses what to do (environments/functions/domains/guessing_clerk.py).
Takes about 11 CPU minutes and 2 GB. docs/log.md says what it reaches.
"""

from configs import quickstart
from orchestra_jax.chat import SMALL_TOKENIZER_DIRECTORY
from orchestra_jax.config import RunConfig


def get_config() -> RunConfig:
    config = quickstart.get_config()
    config.environment = "functions"
    config.prompt.tokenizer_directory = str(SMALL_TOKENIZER_DIRECTORY.parent / "functions_tokenizer")
    config.functions.num_people, config.functions.num_things, config.functions.num_places = 20, 40, 2
    config.functions.difficulties = (1, 2, 3)
    config.functions.has_short_wishes = True
    config.functions.num_spare_calls = 1
    config.functions.num_tasks = 1600
    config.functions.num_test_tasks = 240
    config.functions.demonstrations = "guessed"
    config.world.max_calls = 6
    config.world.reference_cost_usd = 0.01
    config.world.reference_latency_s = 10.0
    config.warm_start.num_steps = 200
    config.grpo.num_steps = 150
    config.grpo.advantage = "grpo"  # its figures are of the group's own deviation
    config.grpo.prefix_buckets = (32,)
    config.grpo.completion_buckets = (64,)
    config.evaluation.num_per_preference = 100
    return config
