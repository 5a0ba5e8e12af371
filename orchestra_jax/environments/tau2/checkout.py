"""The domains of tau2-bench in a checkout of its repository: `src/tau2/domains` and `data/tau2/domains`.

The checkout's code needs what it imports (its `pip install -e .` brings that, and wants Python 3.12), so it is mostly
run by an interpreter of its own (`--server_python`). The benchmark's command line and agents are not imported: of what
`import tau2` pulls in, the tools need a handful of small packages.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import pathlib
import sys
import tomllib
import types

from orchestra_jax.environments.tau2.toolkits import Tau2Domain, Toolkit, base_tasks, check_pinned, digest_files

REPOSITORY, PINNED_VERSION = "tau2-bench", "1.0.1"
# Over the data files of _Parts and the tasks with their splits.
PINNED_DIGESTS = {"airline": "fbfa27ff72af", "retail": "3217cce4864f", "telecom": "edec8ea2730e"}
TASKS, SPLITS = "tasks.json", "split_tasks.json"


@dataclasses.dataclass(frozen=True)
class _Parts:
    """Where the parts of a domain lie: files in its data folder, and MODULE.CLASS in its code."""

    agent_class: str
    agent_data: tuple[str, str]  # class and file
    policies: tuple[tuple[str, str], ...]  # files, and the tag that each is put into; "" for none
    user_class: str = ""
    user_data: tuple[str, str] = ("", "")
    environment: str = ""  # the class whose `sync_tools` keeps both databases in step


PARTS = {
    "airline": _Parts("tools.AirlineTools", ("data_model.FlightDB", "db.json"), (("policy.md", ""),)),
    "retail": _Parts("tools.RetailTools", ("data_model.RetailDB", "db.json"), (("policy.md", ""),)),
    "telecom": _Parts(
        "tools.TelecomTools",
        ("data_model.TelecomDB", "db.toml"),
        (("main_policy.md", "main_policy"), ("tech_support_manual.md", "tech_support_policy")),
        "user_tools.TelecomUserTools",
        ("user_data_model.TelecomUserDB", "user_db.toml"),
        "environment.TelecomEnvironment",
    ),
}


def load_checkout(name: str, checkout: str, is_any_version: bool = False) -> Tau2Domain:
    """The domain in the checkout at that path. Its package is then `tau2` in this process.

    ValueError for a folder without the domain, for code that cannot be imported, and, unless `is_any_version`, for
    other data than the pinned.
    """
    root, parts = pathlib.Path(checkout).resolve(), PARTS[name]
    directory = root / "data" / "tau2" / "domains" / name
    names = [parts.agent_data[1], *(file for file, _ in parts.policies), TASKS]
    names += [parts.user_data[1]] if parts.user_class else []
    paths = [directory / each for each in names]
    missing = [path for path in (*paths, root / "src" / "tau2", root / "pyproject.toml") if not path.exists()]
    if missing:
        raise ValueError(f"{checkout} is no checkout of {REPOSITORY} with {name}: there is no {missing[0]}")
    has_splits = (directory / SPLITS).exists()  # earlier versions have none
    version = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]
    digest = digest_files([*paths, directory / SPLITS] if has_splits else paths)
    check_pinned(REPOSITORY, name, (version, digest), (PINNED_VERSION, PINNED_DIGESTS[name]), is_any_version)
    _make_importable(root / "src" / "tau2")
    agent = _toolkit(name, parts.agent_class, parts.agent_data[0], directory / parts.agent_data[1])
    user = None
    if parts.user_class:
        user = _toolkit(name, parts.user_class, parts.user_data[0], directory / parts.user_data[1])
    splits = json.loads((directory / SPLITS).read_text(encoding="utf-8")) if has_splits else {}
    policies = [((directory / file).read_text(encoding="utf-8"), tag) for file, tag in parts.policies]
    sides = {"assistant": agent, "user": user}
    return Tau2Domain(
        name=name,
        source=REPOSITORY,
        version=version,
        digest=digest,
        agent=agent,
        user=user,
        policy="\n".join(f"<{tag}>\n{text}\n</{tag}>" if tag else text for text, tag in policies),
        tasks=base_tasks((directory / TASKS).read_bytes(), splits),
        splits=splits,
        sync=_named(name, parts.environment).sync_tools if parts.environment else None,
        schemas=lambda side: _schemas(sides[side]),
    )


def _make_importable(package: pathlib.Path) -> None:
    """`import tau2.domains` from here on finds the checkout's modules; the package's own __init__ is passed over.

    ValueError where this process has imported another tau2 before: one process serves one checkout.
    """
    there = sys.modules.get("tau2")
    if there is None:
        there = sys.modules["tau2"] = types.ModuleType("tau2")
        there.__path__ = [str(package)]
    if list(there.__path__) != [str(package)]:
        raise ValueError(
            f"tau2 was imported from {list(there.__path__)} before: serve {package} in a process of its own"
        )


def _named(domain: str, path: str):
    """The class at MODULE.CLASS of a domain's code."""
    module, name = path.rsplit(".", 1)
    try:
        return getattr(importlib.import_module(f"tau2.domains.{domain}.{module}"), name)
    except ImportError as error:
        raise ValueError(
            f"the code of {REPOSITORY} cannot be imported by {sys.executable}: {error}. Install the checkout into an "
            "environment (pip install -e CHECKOUT) and name its interpreter"
        ) from error


def _toolkit(domain: str, tools: str, data: str, path: pathlib.Path) -> Toolkit:
    return Toolkit(_named(domain, tools), _named(domain, data).load(str(path)))


def _schemas(toolkit: Toolkit | None) -> list[dict]:
    return [tool.openai_schema for tool in toolkit.open().get_tools().values()] if toolkit else []
