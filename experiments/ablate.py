"""Ablations in three sizes.

    python -m experiments.ablate --config=configs/quickstart.py --size=tabular
    python -m experiments.ablate --config=configs/smoke.py --size=miniature --workdir=runs/ablate
    python -m experiments.ablate --config=configs/quickstart.py --size=full --workdir=runs/full --seeds=0,1,2

tabular    the full cross of reward form x advantage x aggregation on tables (tabular_cross.py); reads no config
miniature  one factor at a time with the language model: every variant of variants.py
full       the variants of variants.FULL_SIZE

A run of the language model goes to <workdir>/<variant>_seed<seed>; the same command goes on where it was stopped.
"""

from __future__ import annotations

import pathlib

import numpy as np
from absl import flags

from experiments import command_line, variants

_SIZE = flags.DEFINE_enum("size", "tabular", ["tabular", "miniature", "full"], "See the top of the file.")
_WORKDIR = flags.DEFINE_string("workdir", "runs/ablate", "Holds a run directory for each variant and seed.")
_SEEDS = flags.DEFINE_list("seeds", ["0"], "Seeds of every run; of a table the first one.")
_VARIANTS = flags.DEFINE_list("variants", [], "Variants by name; none: all of the size.")
_NUM_STEPS = flags.DEFINE_integer("num_steps", 60, "Of a table's training.", lower_bound=1)


def run_variants(config, names: tuple[str, ...], seeds: list[int], workdir: pathlib.Path) -> str:
    from orchestra_jax.training import run  # takes seconds to import: what is wrong with the flags is said before

    lines = ["| variant | " + " | ".join(f"seed {seed}" for seed in seeds) + " |", "|---|" + "---|" * len(seeds)]
    configs = {(name, seed): variants.with_variant(config, name, seed) for name in names for seed in seeds}
    for name in names:
        summaries = [run(configs[name, seed], str(workdir / f"{name}_seed{seed}")) for seed in seeds]
        means = [np.mean([entry["score"] for entry in each["policies"]["trained"].values()]) for each in summaries]
        lines.append(f"| {name} | " + " | ".join(f"{mean:.3f}" for mean in means) + " |")
        print(lines[-1], flush=True)
    return "\n".join(lines)


def main(config):
    seeds = [int(seed) for seed in _SEEDS.value]
    if _SIZE.value == "tabular":
        from experiments.tabular_cross import format_cross, train_cross

        print(format_cross(train_cross(_NUM_STEPS.value, seeds[0], report=lambda line: print(line, flush=True))))
        return
    names = tuple(_VARIANTS.value) or (variants.FULL_SIZE if _SIZE.value == "full" else variants.FACTORS)
    print(run_variants(config, names, seeds, pathlib.Path(_WORKDIR.value)))


if __name__ == "__main__":
    command_line.run(main)
