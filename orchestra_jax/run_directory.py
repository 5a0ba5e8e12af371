"""The directory of one run: what lies where, and the rule that it holds one run only.

    config.json            the config as run; a resumed run must have the same
    metrics.jsonl          one JSON object a step (metrics.MetricsWriter, which also writes the TensorBoard events here)
    warm_start/            the same of the warm start
    checkpoints/           checkpoints.Checkpointer
    trajectories/          step_<step>.jsonl, one rollout group a line
    spending.json          the real money that the run has spent, if it spends any (tools.budget.Account)
    summary.json           the result

JSON is written to a temporary file and renamed: a reader, or a run after a kill, sees the old file or the new one.
Not here: what goes into the files, and whether there is a checkpoint to go on from (`Checkpointer.latest_step`).
"""

from __future__ import annotations

import dataclasses
import enum
import json
import math
import os
import pathlib
from collections.abc import Iterable, Mapping

import numpy as np

NUM_SHOWN = 3  # differing fields or stray files that an error message names
_MISSING = "nothing"


@dataclasses.dataclass(frozen=True)
class RunDirectory:
    """The paths of a run; made by `open_run_directory`. `is_resumed`: it held this run already."""

    path: pathlib.Path
    is_resumed: bool

    @property
    def config_path(self) -> pathlib.Path:
        return self.path / "config.json"

    @property
    def metrics_path(self) -> pathlib.Path:
        return self.path / "metrics.jsonl"

    @property
    def warm_start_path(self) -> pathlib.Path:
        return self.path / "warm_start"

    @property
    def checkpoints_path(self) -> pathlib.Path:
        return self.path / "checkpoints"

    @property
    def trajectories_path(self) -> pathlib.Path:
        return self.path / "trajectories"

    @property
    def spending_path(self) -> pathlib.Path:
        return self.path / "spending.json"

    @property
    def summary_path(self) -> pathlib.Path:
        return self.path / "summary.json"

    def write_summary(self, summary: Mapping[str, object]) -> None:
        write_json(self.summary_path, summary)

    def write_trajectories(self, step: int, groups: Iterable[object]) -> pathlib.Path:
        """Writes the groups (dicts or dataclasses such as `types.TrajectoryGroup`) of `step`, one JSON a line."""
        path = self.trajectories_path / f"step_{step:06d}.jsonl"
        write_text(path, "".join(json.dumps(json_value(group, "group")) + "\n" for group in groups))
        return path


def open_run_directory(path: str | os.PathLike, config_dict: Mapping[str, object]) -> RunDirectory:
    """Makes `path` the directory of the run with this config, or opens it again if it is that already.

    Args:
      path: a new, an empty, or this run's directory.
      config_dict: the config, as `config_as_dict` gives it.

    Raises:
      ValueError: `path` holds another run or files that are no run, or cannot be written. Nothing is overwritten.
    """
    path = pathlib.Path(path).absolute()
    config_dict = json_value(config_dict, "config")
    config_path = path / "config.json"
    try:
        path.mkdir(parents=True, exist_ok=True)
        is_resumed = config_path.exists()
        if is_resumed:
            _check_same_run(path, json.loads(config_path.read_text(encoding="utf-8")), config_dict)
        else:
            _check_empty(path)
            write_json(config_path, config_dict)
        for name in ("checkpoints", "trajectories"):
            (path / name).mkdir(exist_ok=True)
    except OSError as error:
        raise ValueError(f"cannot write to run directory {path}: {error.strerror}; choose another --workdir") from error
    except json.JSONDecodeError as error:
        raise ValueError(f"{config_path} is no JSON ({error}); choose another --workdir") from error
    if not os.access(path, os.W_OK):
        raise ValueError(f"cannot write to run directory {path}: no permission; choose another --workdir")
    return RunDirectory(path, is_resumed)


def config_as_dict(config: object) -> dict[str, object]:
    """A nested dataclass as nested dicts of JSON values; ValueError names a field that cannot be written as JSON."""
    if not dataclasses.is_dataclass(config) or isinstance(config, type):
        raise ValueError(f"a config is a dataclass instance, not {config!r}")
    return json_value(config, "config")


def config_from_dict(config: object, values: Mapping[str, object]) -> object:
    """A copy of the nested dataclass `config` with the values that `config_as_dict` wrote.

    ValueError for a field that only one of the two has: the file is of another version.
    """
    names = {field.name for field in dataclasses.fields(config)}
    if names ^ set(values):
        raise ValueError(f"fields that only the config or its file has: {sorted(names ^ set(values))}")

    def read(there, value):
        if dataclasses.is_dataclass(there):
            return config_from_dict(there, value)
        return tuple(value) if isinstance(there, tuple) else type(there)(value)

    return dataclasses.replace(config, **{name: read(getattr(config, name), values[name]) for name in names})


def json_value(value: object, name: str) -> object:
    """`value` as JSON: dataclasses become dicts, tuples and arrays lists, enums their values, paths strings.

    A float that JSON cannot hold becomes the string "nan", "inf" or "-inf", so that configs with one still compare.

    Raises:
      ValueError: a value, named by its path from `name`, is of another type, or a key is no string.
    """
    if isinstance(value, enum.Enum):
        return json_value(value.value, name)
    if isinstance(value, (np.ndarray, np.generic)):
        return json_value(value.tolist(), name)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = dataclasses.fields(value)
        return {field.name: json_value(getattr(value, field.name), f"{name}.{field.name}") for field in fields}
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str):
                raise ValueError(f"{name} has the key {key!r}: JSON keys are strings")
        return {str(key): json_value(item, f"{name}.{key}") for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [json_value(item, f"{name}[{index}]") for index, item in enumerate(value)]
    if isinstance(value, float):
        return value if math.isfinite(value) else repr(value)
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    raise ValueError(f"{name} is {value!r}: only numbers, strings, lists, dicts and dataclasses can be written as JSON")


def write_json(path: pathlib.Path, value: object) -> None:
    """Writes `value` (see `json_value`) as indented JSON; atomic."""
    write_text(path, json.dumps(json_value(value, path.stem), indent=2) + "\n")


def read_json(path: pathlib.Path) -> dict[str, object]:
    """The JSON object of a file that `write_json` wrote."""
    return json.loads(path.read_text(encoding="utf-8"))


def write_text(path: pathlib.Path, text: str) -> None:
    """Replaces the file `path` by `text` (UTF-8); atomic."""
    temporary = path.with_name(f".{path.name}.tmp")
    with open(temporary, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())  # else a power cut can leave the new name on an empty file
    os.replace(temporary, path)


def _check_empty(path):
    # A kill before the first rename leaves .config.json.tmp: that directory is still as good as empty.
    names = sorted(entry.name for entry in path.iterdir() if not entry.name.endswith(".tmp"))
    if names:
        shown = ", ".join(names[:NUM_SHOWN])
        raise ValueError(f"{path} is no run directory: it has no config.json but holds {shown}; choose a new --workdir")


def _check_same_run(path, there, here):
    there, here = _flatten(there), _flatten(here)
    names = [name for name in {**there, **here} if there.get(name, _MISSING) != here.get(name, _MISSING)]
    if names:
        shown = "; ".join(
            f"{name} is {there.get(name, _MISSING)} there, {here.get(name, _MISSING)} here"
            for name in names[:NUM_SHOWN]
        )
        more = f"; and {len(names) - NUM_SHOWN} more" if len(names) > NUM_SHOWN else ""
        raise ValueError(
            f"{path} holds a run with another config ({shown}{more}); choose a new --workdir or that run's config"
        )


def _flatten(value, name=""):
    """Leaves by dotted name, written as JSON: as JSON, 1 and true differ, and a string differs from nothing at all."""
    if isinstance(value, dict) and value:
        leaves = {}
        for key, item in value.items():
            leaves |= _flatten(item, f"{name}.{key}" if name else key)
        return leaves
    return {name: json.dumps(value)}
