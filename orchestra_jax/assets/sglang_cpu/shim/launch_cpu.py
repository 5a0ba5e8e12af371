"""SGLang's own entry point, once torchvision can be imported.

The import stands at the top: schedulers are spawned, and import this module again.
"""

import sys

import torchvision_schemas  # noqa: F401

if __name__ == "__main__":
    from sglang.launch_server import run_server
    from sglang.srt.server_args import prepare_server_args

    run_server(prepare_server_args(sys.argv[1:]))
