"""Where a tau2 domain comes from, by choice: the package inspect-evals, or a checkout of tau2-bench."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from orchestra_jax.environments.tau2.checkout import load_checkout
from orchestra_jax.environments.tau2.packaged import PARTS, load_packaged
from orchestra_jax.environments.tau2.toolkits import Tau2Domain


def load_domain(name: str, checkout: str = "", is_any_version: bool = False) -> Tau2Domain:
    """The packaged domain, or that of the checkout at a path. ImportError without what its code needs; ValueError for a
    domain that is not there and, unless `is_any_version`, for other data than the pinned."""
    if name not in PARTS:
        raise ValueError(f"tau2 domain {name!r} is not one of {sorted(PARTS)}")
    return load_checkout(name, checkout, is_any_version) if checkout else load_packaged(name, is_any_version)


def command_line(name: str, checkout: str = "", is_any_version: bool = False) -> list[str]:
    """The arguments by which another process is told; `domain_of_command_line` reads them there."""
    return [name, *(["--checkout", checkout] if checkout else []), *(["--any_version"] if is_any_version else [])]


def domain_of_command_line(arguments: Sequence[str]) -> Tau2Domain:
    parser = argparse.ArgumentParser()
    parser.add_argument("domain")
    parser.add_argument("--checkout", default="", help="A checkout of tau2-bench; without one, inspect-evals.")
    parser.add_argument("--any_version", action="store_true", help="Take data other than the pinned, too.")
    read = parser.parse_args(arguments)
    return load_domain(read.domain, read.checkout, read.any_version)
