#!/usr/bin/env bash
# Builds the environment of a real SGLang 0.5.23 server, and of a router, on CPU: 3.3 GB, three to ten minutes. Keep it
# apart from the trainer's: it pins its own torch. An environment that this very recipe has built is left as it is.
#
#     bash orchestra_jax/assets/sglang_cpu/install.sh            prints the interpreter
#     bash orchestra_jax/assets/sglang_cpu/install.sh DIRECTORY
#
# PYTHON names another interpreter than python3 (3.11 or newer). sglang itself goes in without its own dependencies,
# which are for CUDA. Where the package index has torch for CUDA alone, that serves too, and is larger.
set -euo pipefail
recipe="$(sha256sum "${BASH_SOURCE[0]}" | cut -c1-12)"
venv="${1:-${XDG_CACHE_HOME:-$HOME/.cache}/orchestra_jax/sglang_cpu_$recipe}"
python="$venv/bin/python"
if [[ -f "$venv/recipe" && "$(cat "$venv/recipe")" == "$recipe" ]]; then
  echo "$python"
  exit 0
fi
"${PYTHON:-python3}" -m venv --clear "$venv"
"$python" -m pip install --quiet torch==2.13.0 >&2
"$python" -m pip install --quiet torch==2.13.0 aiohttp 'anthropic>=0.20.0' apache-tvm-ffi==0.1.11 blobfile==3.0.0 \
  compressed-tensors==0.18.0 datasets distro easydict einops fastapi gguf interegular IPython 'kernels<0.15,>=0.14.1' \
  'llguidance<2.0.0,>=1.7.6' 'mistral_common>=1.11.5' msgspec ninja numba==0.65.1 numpy openai==2.8.0 \
  openai-harmony==0.0.4 orjson outlines==0.1.11 packaging partial_json_parser pillow prometheus-client psutil py-spy \
  pybase64 pydantic python-multipart 'pyzmq>=25.1.2' regex requests scipy sentencepiece==0.2.1 setproctitle \
  soundfile==0.13.1 tiktoken tokenizers==0.23.2 tqdm transformers==5.19.0 'uvicorn>=0.51' uvloop watchfiles \
  xgrammar==0.2.7 xxhash zstandard nvidia-ml-py hf_transfer >&2
"$python" -m pip install --quiet --no-deps torchvision==0.28.0 sglang==0.5.23 sglang-router==0.3.2 >&2
echo "$recipe" > "$venv/recipe"
echo "$python"
