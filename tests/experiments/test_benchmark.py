"""The dispatcher of the benchmarks, and the step compiled ahead of time for simulated devices."""

import json
import math
import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[2]


def run_suite(*arguments):
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"} | {"JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-m", "experiments.benchmark", *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=540)


def test_options_are_values_by_name():
    from experiments.benchmark import parse_option

    assert parse_option("num_steps=2") == ("num_steps", 2)
    assert parse_option("model=qwen3-8b") == ("model", "qwen3-8b")
    with pytest.raises(ValueError, match="--option=fsdp: write name=value"):
        parse_option("fsdp")


@pytest.mark.slow
def test_the_8b_step_compiles_for_sixteen_devices_without_being_allocated():
    """Parameters, master copy, moments and gradients of 8.19e9 parameters, a sixteenth of them on each device."""
    result = run_suite("--suite=aot", "--option=model=qwen3-8b", "--option=num_tokens=512")
    assert result.returncode == 0, result.stderr[-3000:]
    figures = json.loads(result.stdout)
    share = 8.19e9 / 16
    # In: bfloat16 parameters and float32 gradients; then those with a float32 master and two float32 moments.
    assert figures["gradients_argument_bytes_per_device"] == pytest.approx(share * (2 + 4), rel=0.02)
    assert figures["optimizer_argument_bytes_per_device"] == pytest.approx(share * (2 + 4 + 4 + 8), rel=0.02)
    assert figures["gradients_aliased_bytes_per_device"] == pytest.approx(share * 4, rel=0.02)
    assert figures["optimizer_aliased_bytes_per_device"] == pytest.approx(share * 14, rel=0.02)


@pytest.mark.slow
def test_a_step_compiles_for_gpus_that_are_not_there():
    """With cuDNN's attention, and less than the CPU's compiler needs, which computes in float32."""
    pytest.importorskip("jax_plugins.xla_cuda13", reason="pip install 'jax[cuda13]'")
    sizes = ["--option=model=qwen3-8b", "--option=num_layers=2", "--option=num_tokens=512", "--option=batching=packed"]
    by_platform = {}
    for platform in ("cpu", "h200"):
        result = run_suite("--suite=aot", *sizes, f"--option=platform={platform}")
        assert result.returncode == 0, result.stderr[-3000:]
        by_platform[platform] = json.loads(result.stdout)
    cpu, h200 = by_platform["cpu"], by_platform["h200"]
    assert h200["gradients_argument_bytes_per_device"] == cpu["gradients_argument_bytes_per_device"]
    assert h200["gradients_temporary_bytes_per_device"] < cpu["gradients_temporary_bytes_per_device"]
    # Forward, forward again, backward; on a CPU there is none.
    assert (h200["gradients_cudnn_attentions"], cpu["gradients_cudnn_attentions"]) == (3, 0)


@pytest.mark.slow
def test_the_train_step_at_qwen3s_vocabulary_holds_half_of_what_the_peer_holds():
    result = run_suite("--suite=train_step", "--option=num_steps=1")
    assert result.returncode == 0, result.stderr[-3000:]
    figures = json.loads(result.stdout)
    assert figures["temporary_bytes"] < 2_493_464_248 / 2  # google-tunix at c7d8950f: docs/benchmarks.md
    assert figures["loss_nats"] == pytest.approx(math.log(151_936), rel=0.05)  # fresh weights know nothing
    assert figures["tokens_per_cpu_s"] > 0


@pytest.mark.slow
@pytest.mark.parametrize("options", [(), ("--option=lora_rank=2", "--option=precision=float32")])
def test_the_grpo_step_of_a_published_size_runs_on_any_device(options):
    sizes = ("--option=model=tiny", "--option=num_tokens=64", "--option=chunk=32", "--option=num_steps=1")
    result = run_suite("--suite=grpo_step", *sizes, *options)
    assert result.returncode == 0, result.stderr[-3000:]
    figures = json.loads(result.stdout)
    assert figures["reference_tflop"] * (2 if options else 3) <= figures["update_tflop"]
    assert 0 < figures["update_s"] < figures["step_s"] and math.isfinite(figures["loss"])
