"""Mesh, logical-axis rules, placement. Knows no model: a model names its dims, this file gives them mesh axes.

A tree of logical axes has a PartitionSpec of logical names at each leaf; RULES turn the names into mesh axes.
Activations follow the same table inside `mesh_context`. The same code serves one CPU and many devices: an axis that the
mesh lacks, or that has size 1, splits nothing.
"""

from __future__ import annotations

import contextlib
import math

import flax.linen as nn
import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

# Logical name -> mesh axes that split the dim. Parameters: tensor parallel over heads, feed-forward and vocab, fully
# sharded over the embedding dim. Data: rows over both data axes.
RULES = {
    "layers": (),
    "embed": ("fsdp",),
    "vocab": ("tensor",),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "head_dim": (),
    "mlp": ("tensor",),
    "norm": (),
    "batch": ("data", "fsdp"),
    "length": ("context",),
    "activation": (),
}
HOST_MEMORY = "pinned_host"  # jax's name for memory of the host that its devices copy from and to


def make_mesh(axis_sizes, devices=None) -> Mesh:
    """A mesh with axes in the order of `axis_sizes`, e.g. {"data": 1, "fsdp": 4, "tensor": 2}.

    Takes the first devices that fill it, of `devices` or of all there are. ValueError if there are too few.
    """
    devices = jax.devices() if devices is None else devices
    num_devices = math.prod(axis_sizes.values())
    if num_devices > len(devices):
        raise ValueError(f"mesh {axis_sizes} needs {num_devices} devices, there are {len(devices)}: lower an axis")
    return jax.make_mesh(
        tuple(axis_sizes.values()),
        tuple(axis_sizes),
        axis_types=(AxisType.Auto,) * len(axis_sizes),
        devices=devices[:num_devices],
    )


def shardings(logical_axes_tree, mesh):
    """The tree with a NamedSharding in place of each PartitionSpec of logical names.

    ValueError for a name without a rule, and for two dims of one array on the same mesh axis.
    """
    return jax.tree.map(
        lambda names: NamedSharding(mesh, _as_jit_writes_it(mesh_axes(names, mesh), mesh)),
        logical_axes_tree,
        is_leaf=lambda leaf: isinstance(leaf, PartitionSpec),
    )


def mesh_axes(logical_names, mesh) -> PartitionSpec:
    """The PartitionSpec of mesh axes for a sequence of logical names (None: a dim that is never split)."""
    dims = []
    for name in logical_names:
        if name is not None and name not in RULES:
            raise ValueError(f"logical axis {name!r} of {tuple(logical_names)} has no rule: add it to sharding.RULES")
        dims.append(tuple(axis for axis in RULES.get(name, ()) if axis in mesh.shape))
    used = [axis for dim in dims for axis in dim]
    if len(set(used)) < len(used):
        raise ValueError(f"{tuple(logical_names)} puts two dims on one mesh axis: {dims}; change sharding.RULES")
    return PartitionSpec(*(dim if dim else None for dim in dims))


def _as_jit_writes_it(spec: PartitionSpec, mesh) -> PartitionSpec:
    """Without axes of size 1, and without Nones at the end.

    The arrays that a jitted function returns are spelled so; the same layout spelled otherwise compiles it once more.
    """
    dims = [() if dim is None else (dim,) if isinstance(dim, str) else dim for dim in spec]
    dims = [tuple(axis for axis in dim if mesh.shape[axis] > 1) for dim in dims]
    while dims and not dims[-1]:
        dims.pop()
    return PartitionSpec(*(dim or None for dim in dims))


def has_mesh() -> bool:
    """Whether this is within `mesh_context`."""
    return not jax.sharding.get_abstract_mesh().empty


def num_splits(logical_name) -> int:
    """In how many parts the mesh of `mesh_context` cuts a dim of that name; 1 outside of one."""
    mesh = jax.sharding.get_abstract_mesh()
    return math.prod(mesh.shape[axis] for axis in RULES[logical_name] if axis in mesh.shape)


def place(tree, shardings_tree):
    """The arrays of `tree` laid out as `shardings_tree` says; a dim must be a multiple of the axes that split it."""
    return jax.tree.map(jax.device_put, tree, shardings_tree)


def memory_kinds() -> frozenset[str]:
    """The kinds of memory that the devices reach."""
    return frozenset(memory.kind for memory in jax.devices()[0].addressable_memories())


def host_shardings(tree):
    """Where the arrays of `tree`, or of their shapes, lie, but in the memory of the host; counters stay."""
    return jax.tree.map(lambda leaf: leaf.sharding.with_memory_kind(HOST_MEMORY) if leaf.ndim else leaf.sharding, tree)


def device_shardings(tree):
    """Where the arrays of `tree` lie, but all of them in their devices' own memory."""
    own = jax.devices()[0].default_memory().kind
    return jax.tree.map(lambda leaf: leaf.sharding.with_memory_kind(own), tree)


def constrain(tree, logical_axes_tree):
    """Within a jitted function under `mesh_context`: the arrays held to RULES. Elsewhere: the arrays as they are."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return tree
    return jax.tree.map(
        lambda names, leaf: jax.lax.with_sharding_constraint(leaf, mesh_axes(names, mesh)),
        logical_axes_tree,
        tree,
        is_leaf=lambda leaf: isinstance(leaf, PartitionSpec),
    )


@contextlib.contextmanager
def mesh_context(mesh):
    """Within it, jitted functions run on `mesh` and the models' activations are held to RULES."""
    rules = [(name, mesh_axes([name], mesh)[0]) for name in RULES]
    with jax.set_mesh(mesh), nn.logical_axis_rules(rules):
        yield mesh
