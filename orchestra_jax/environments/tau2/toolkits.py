"""The domains of tau2-bench as the PyPI package inspect-evals carries them: data, tasks, policies and the tools' code.

The tools run as they are, on a database of ours: their methods are taken from their classes and given a `db` that is a
view on shared entries (functions/database.py). So a reset copies nothing and an episode costs what it changes.

Runs in any interpreter that has inspect-evals: this one, or that of worker.py. Source of the data and of the tools:
sierra-research/tau2-bench, MIT.
"""

from __future__ import annotations

import copy
import dataclasses
import gzip
import hashlib
import importlib
import importlib.metadata
import importlib.resources
import inspect
import json
import pathlib
import types

from orchestra_jax.environments.functions.database import Base, Database

PACKAGE, PINNED_VERSION = "inspect-evals", "0.26.0"
# The first 12 digits of the SHA-256 over the domain's files, by name: what the figures in the README were taken on.
PINNED_DIGESTS = {"airline": "539dc77797e2", "retail": "174dfccc6eb4", "telecom": "4a1432fa5f7f"}


@dataclasses.dataclass(frozen=True)
class _Sources:
    """Where the parts of a domain lie in the package."""

    agent_class: str
    agent_functions: str  # the module that describes them to a model
    policies: tuple[str, ...]
    tasks: str
    user_class: str = ""
    user_functions: str = ""
    environment: str = ""  # the module of the class that keeps both databases in step


_ROOT = "inspect_evals.tau2"
SOURCES = {
    "airline": _Sources("airline.AirlineAgentTools", "airline.tools", ("policy.txt",), "tasks.json"),
    "retail": _Sources("retail.RetailAgentTools", "retail.tools", ("policy.txt",), "tasks.json"),
    "telecom": _Sources(
        "telecom.TelecomAgentTools",
        "telecom.tools",
        ("main_policy.txt", "tech_support_manual.txt"),
        "tasks.json.gz",
        "telecom.TelecomUserTools",
        "telecom.user_tools",
        "telecom.environment",
    ),
}


class Toolkit:
    """The methods of one side of a domain, and the database that they find as `self.db`."""

    def __init__(self, original: type, base: Base):
        methods = {name: each for name, each in vars(original).items() if _is_method(each)}
        self._class = type(original.__name__, (), methods)
        # What the original keeps besides its database: plain values, copied for each episode.
        fields = {name: field for name, field in original.model_fields.items() if name not in ("db", "initialized")}
        own = {name: field for name, field in fields.items() if name in original.__annotations__}
        self._values = {name: field.get_default(call_default_factory=True) for name, field in own.items()}
        self.base = base

    def open(self):
        """The toolkit of a new episode."""
        made = self._class()
        made.__dict__.update(copy.deepcopy(self._values), db=Database(self.base))
        return made


def _is_method(value: object) -> bool:
    return inspect.isfunction(value) or isinstance(value, (property, staticmethod, classmethod))


class Tau2Domain:
    """ValueError for a domain that is not packaged, and, unless `is_any_version`, for other data than the pinned."""

    def __init__(self, name: str, is_any_version: bool = False):
        if name not in SOURCES:
            raise ValueError(f"tau2 domain {name!r} is not one of {sorted(SOURCES)}")
        self.name, sources = name, SOURCES[name]
        self._directory = (
            pathlib.Path(str(importlib.resources.files("inspect_evals"))) / "tau2" / "data" / "domains" / name
        )
        self.version, self.digest = importlib.metadata.version(PACKAGE), _digest(self._directory)
        if not is_any_version and (self.version, self.digest) != (PINNED_VERSION, PINNED_DIGESTS[name]):
            raise ValueError(
                f"{PACKAGE} {self.version} has {name} data {self.digest}, pinned are {PINNED_VERSION} and "
                f"{PINNED_DIGESTS[name]}: install {PACKAGE}=={PINNED_VERSION}, or ask for any version"
            )
        self.agent = _toolkit(sources.agent_class)
        self.user = _toolkit(sources.user_class) if sources.user_class else None
        self.policy = "\n\n".join((self._directory / each).read_text(encoding="utf-8") for each in sources.policies)
        self.tasks = self._read_tasks(sources.tasks)
        self.sync = (
            importlib.import_module(f"{_ROOT}.{sources.environment}").Environment.sync_tools if self.user else None
        )
        self._sources = sources

    def _read_tasks(self, name: str) -> dict[str, dict]:
        """The tasks of the base split, by id, in the order of the file."""
        path = self._directory / name
        raw = gzip.decompress(path.read_bytes()) if name.endswith(".gz") else path.read_bytes()
        ids = set(json.loads((self._directory / "split_tasks.json").read_text(encoding="utf-8"))["base"])
        return {task["id"]: task for task in json.loads(raw) if task["id"] in ids}

    def schemas(self, side: str = "assistant") -> list[dict]:
        """The functions of a side in the OpenAI function format."""
        definition = importlib.import_module("inspect_ai.tool").ToolDef
        name = self._sources.agent_functions if side == "assistant" else self._sources.user_functions
        module = importlib.import_module(f"{_ROOT}.{name}")
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
    module = importlib.import_module(f"{_ROOT}.{path}")
    original = getattr(module, path.rsplit(".", 1)[1])
    loaded = _load(original)
    # Fields and not the model: tau2 validates nothing when a tool has written.
    return Toolkit(original, Base(dict(loaded.__dict__)))


def _load(original: type):
    """The database that `initialize` of the original loads."""
    holder = types.SimpleNamespace(initialized=False)
    original.initialize(holder)
    return holder.db


def _digest(directory: pathlib.Path) -> str:
    digest = hashlib.sha256()
    for path in sorted(directory.iterdir()):
        if path.is_file():
            digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:12]
