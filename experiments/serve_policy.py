"""Starts the SGLang servers of a config on this machine, and starts a dead one again with the current weights.

    python -m experiments.serve_policy --config=configs/quickstart.py --server_python=PYTHON

PYTHON is the interpreter of the servers' own environment. Runs until Ctrl-C or SIGTERM, beside
`python -m experiments.train ... --config.engine=sglang`, with the same `--config.sglang` and `--config.model`.
"""

import os
import pathlib
import signal
import threading
import urllib.parse

from absl import flags

from experiments import command_line

_SERVER_PYTHON = flags.DEFINE_string("server_python", None, "The interpreter that has sglang.", required=True)
_HOST = flags.DEFINE_string("host", "127.0.0.1", "Start the servers whose URL names this host, and no others.")


def main(config):
    from orchestra_jax.components import build_chat_and_model, check_config
    from orchestra_jax.generation.sglang.processes import ServerProcess, prepare_model_directory, watch
    from orchestra_jax.models.huggingface_config import config_fields

    check_config(config)
    if not os.access(_SERVER_PYTHON.value, os.X_OK):
        raise ValueError(f"--server_python={_SERVER_PYTHON.value} is no program: name the interpreter that has sglang")
    urls = [url for url in config.sglang.urls if urllib.parse.urlsplit(url).hostname == _HOST.value]
    if not urls:
        raise ValueError(f"no URL of sglang.urls {config.sglang.urls} names --host={_HOST.value}")
    _, model_config = build_chat_and_model(config)
    prepare_model_directory(config.sglang, config_fields(model_config))
    python = str(pathlib.Path(_SERVER_PYTHON.value).absolute())
    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    watch(
        [ServerProcess(python, config.sglang, config.serving, url, number) for number, url in enumerate(urls)],
        stop.is_set,
    )


if __name__ == "__main__":
    command_line.run(main)
