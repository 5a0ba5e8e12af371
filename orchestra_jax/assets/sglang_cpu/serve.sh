#!/usr/bin/env bash
# Starts a real SGLang server on CPU with the interpreter that install.sh has built. Flags are SGLang's own.
#
#     bash orchestra_jax/assets/sglang_cpu/serve.sh PYTHON --model-path DIRECTORY --port 30000
#
# One thread and no overlap of scheduling: with more a small model is ten times as slow.
set -euo pipefail
python="$1"
shift
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
export OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false SGLANG_USE_CPU_ENGINE=1 HF_HUB_OFFLINE=1
export PYTHONPATH="$here/shim"
exec "$python" "$here/shim/launch_cpu.py" --device cpu --attention-backend torch_native --skip-server-warmup \
  --disable-overlap-schedule "$@"
