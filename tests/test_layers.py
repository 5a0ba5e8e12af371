"""The import order of the package: one way, low to high; where jax and HTTP may stand.

Read from the source, so that an import inside a function counts too. One process then imports the jax-free modules for
real: a library that brings jax along shows nowhere else.
"""

import ast
import functools
import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]
PACKAGE = "orchestra_jax"

# Low to high. A module may import from its own row and the rows above it in this list.
ROWS = (
    ("types", "seeds"),
    (
        "sharding",
        "optimizers",
        "precision",
        "chat",
        "metrics",
        "run_directory",
        "tools",
        "rewards",
        "grpo.advantages",
        "grpo.filters",
        "grpo.loss",
        "data.records",
        "data.tables",
        "data.corpus",
        "data.questions",
        "data.preferences",
    ),
    (
        "experts",
        "models",
        "data.instances",
        "data.loaders.rows",
        "data.loaders.questions",
        "data.loaders.release",
        "data.loaders.bfcl",
        "data.sources",
        "data.preference_pairs.pair",
        "data.preference_pairs.templates",
    ),
    (
        "generation",
        "grpo.accumulation",
        "grpo.batching",
        "grpo.packing",
        "grpo.scoring",
        "grpo.train_state",
        "grpo.train_step",
        "grpo.kl_penalty",
        "supervised",
        "data.pipeline",
        "checkpoints",
    ),
    ("environments", "data.synthesis.records", "data.synthesis.sandboxed", "data.synthesis.domain_file"),
    (
        "demonstrations",
        "config",
        "toolset",
        "function_files",
        "function_world",
        "tau2_world",
        "worlds",
        "components",
        "settings",
        "policy",
        "rollout_metrics",
        "collection",
    ),
    ("data.loaders.toolscale", "data.synthesis", "data.preference_pairs.written", "evaluation"),
    ("experience",),
    ("sampler",),
    ("training",),
    ("trained_policy",),
    ("export",),
)

JAX_FREE = (
    "types",
    "chat",
    "metrics",
    "run_directory",
    "tools",
    "experts",
    "rewards",
    "environments",
    "data.records",
    "data.tables",
    "data.corpus",
    "data.questions",
    "data.preferences",
    "data.instances",
    "data.loaders",
    "data.sources",
    "data.preference_pairs",
    "data.synthesis",
    "generation.engine",
    "generation.sglang_engine",
    "generation.sglang",
    "generation.scripted_engine",
)
JAX_LIBRARIES = {"jax", "jaxlib", "flax", "optax", "orbax", "chex"}

HTTP_MODULES = ("generation.sglang_engine", "generation.sglang", "tools", "experts.endpoint", "experts.chat_completion")
HTTP_LIBRARIES = {
    "aiohttp",
    "anthropic",
    "http",
    "httpx",
    "httpx2",
    "mcp",
    "openai",
    "requests",
    "socket",
    "urllib.request",
    "urllib3",
    "websockets",
}

OUTSIDE = {"experiments", "configs", "notebooks", "tests"}


def is_within(module, names):
    return any(module == name or module.startswith(name + ".") for name in names)


def row_of(module):
    """The index of the row that `module` (without the package's name) stands in; None if it stands in none."""
    return next((index for index, names in enumerate(ROWS) if is_within(module, names)), None)


@functools.cache
def package_modules():
    """Source by module name without the package's; a package's own file is named with __init__.

    Assets are no modules: a server of another environment runs those.
    """
    folder = ROOT / PACKAGE
    return {
        ".".join(path.relative_to(folder).with_suffix("").parts): path.read_text(encoding="utf-8")
        for path in sorted(folder.rglob("*.py"))
        if "assets" not in path.relative_to(folder).parts
    }


def imported_names(source, module):
    """All that `source` imports, absolute: "a.b" for `import a.b`, "a.b" and "a.b.c" for `from a.b import c`."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = [node.module] if node.module else []
            if node.level:
                base = [PACKAGE, *module.split(".")][: -node.level] + base
            yield ".".join(base)
            yield from (".".join([*base, alias.name]) for alias in node.names)


def violations(module, source):
    """What `module` imports against the rules, as sentences."""
    row = row_of(module)
    is_package_file = module.split(".")[-1] == "__init__"
    if row is None and not is_package_file:
        yield f"{module} stands in no row of ROWS"
    for name in sorted(set(imported_names(source, module))):
        if name == PACKAGE or name.startswith(PACKAGE + "."):
            target_row = row_of(name.removeprefix(PACKAGE + "."))
            if row is None and is_package_file:
                yield f"{module} imports {name}: it stands in no row, so it imports nothing of the package"
            elif None not in (row, target_row) and target_row > row:
                yield f"{module} imports {name}, which stands above it"
        if is_within(name, OUTSIDE):
            yield f"{module} imports {name}, which is outside the package"
        if is_within(name, JAX_LIBRARIES) and is_within(module, JAX_FREE):
            yield f"{module} imports {name}: it is to run without jax"
        if is_within(name, HTTP_LIBRARIES) and not is_within(module, HTTP_MODULES):
            yield f"{module} imports {name}: HTTP stands in {', '.join(HTTP_MODULES)} only"


def test_the_package_keeps_its_layers():
    found = [told for module, source in package_modules().items() for told in violations(module, source)]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("module", "source", "told"),
    [
        ("types", "from orchestra_jax import chat", "types imports orchestra_jax.chat, which stands above it"),
        ("tools.ledger", "import orchestra_jax.experts.catalog", "which stands above it"),
        ("grpo.loss", "from .train_step import step", "grpo.loss imports orchestra_jax.grpo.train_step, which"),
        ("data.records", "from ..training import loop", "data.records imports orchestra_jax.training, which"),
        ("models.lora", "def f():\n    from orchestra_jax import training", "which stands above it"),
        ("environments.rollout", "import jax.numpy as jnp", "environments.rollout imports jax.numpy: it is to run"),
        ("data.questions.facts", "from flax import linen", "data.questions.facts imports flax: it is to run"),
        ("models.huggingface", "import urllib.request", "models.huggingface imports urllib.request: HTTP stands in"),
        ("experts.catalog", "from openai import AsyncOpenAI", "experts.catalog imports openai: HTTP stands in"),
        ("training", "from configs import smoke", "training imports configs, which is outside the package"),
        ("novelty", "", "novelty stands in no row of ROWS"),
        ("data.novelty", "", "data.novelty stands in no row of ROWS"),
        ("data.__init__", "from orchestra_jax.types import Turn", "data.__init__ imports orchestra_jax.types: it"),
    ],
)
def test_a_planted_violation_is_found(module, source, told):
    assert any(told in sentence for sentence in violations(module, source))


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("training", "import jax\nfrom orchestra_jax import types, evaluation"),
        ("experts.endpoint", "import openai\nfrom orchestra_jax.tools.ledger import Ledger"),
        ("generation.jax_engine", "import jax\nfrom . import engine"),
        ("models.huggingface", "import urllib.parse"),
        ("data.__init__", ""),
        ("tools.__init__", "from orchestra_jax.tools.tool import Tool"),
    ],
)
def test_what_is_allowed_passes(module, source):
    assert list(violations(module, source)) == []


def test_jax_free_modules_import_without_jax():
    names = [f"{PACKAGE}.{name}".removesuffix(".__init__") for name in package_modules() if is_within(name, JAX_FREE)]
    script = f"""
import importlib, sys
for name in {names}:
    importlib.import_module(name)
    brought = sorted({sorted(JAX_LIBRARIES)} & sys.modules.keys())
    assert not brought, f"{{name}} brings {{brought}}"
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    result = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
