"""Gradient accumulation: the gradients of an update's micro-batches, added up, by several threads if there are cores.

On a CPU the small programs of a small model fill no two cores, and XLA runs those of one thread one after the other:
the micro-batches are dealt out to threads, each of which adds up a sum of its own. Who adds what is fixed, so that the
same batch has the same sum to the last bit. A mesh is known to the thread that entered it alone: there, one thread.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp


def deal_out(items: Sequence, num_threads: int) -> list[list]:
    """One part for each thread, none empty: the items k, k + num_threads, ... to thread k."""
    return [list(items[k::num_threads]) for k in range(min(num_threads, len(items)))]


def in_threads(function: Callable, parts: Sequence) -> list:
    """[function(part) for part in parts], a thread for each; a single part stays in the caller's own."""
    if len(parts) == 1:
        return [function(parts[0])]
    with ThreadPoolExecutor(len(parts), "gradients") as pool:
        return list(pool.map(function, parts))


def sum_gradients(add: Callable, make_zeros: Callable, parts: Sequence[Sequence]) -> tuple[object, list]:
    """-> (the sum of all gradients, what `add` says beside them, part by part).

    add: (gradients, item) -> (gradients, anything); it may donate what it is given. make_zeros: () -> gradients of 0.
    A single item is the sum: it is added to None, which saves the memory of zeros, and the time to add to them.
    """
    if sum(map(len, parts)) == 1:
        gradients, said = add(None, parts[0][0])
        return gradients, [said]

    def sum_part(part):
        gradients, said = make_zeros(), []
        for item in part:
            gradients, some = add(gradients, item)
            said.append(some)
        return gradients, said

    sums, said = zip(*in_threads(sum_part, parts), strict=True)
    return functools.reduce(_added, sums), [some for part in said for some in part]


@functools.partial(jax.jit, donate_argnums=0)
def _added(total, more):
    return jax.tree.map(jnp.add, total, more)
