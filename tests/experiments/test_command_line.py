"""The command line, each case in a process of its own: absl's flags are global."""

import os
import pathlib
import subprocess
import sys

import pytest

from experiments.command_line import CommandLineError, load_config

ROOT = pathlib.Path(__file__).parents[2]

EXPERIMENT = '''
"""A tiny experiment."""
from absl import flags
from experiments import command_line

WORKDIR = flags.DEFINE_string("workdir", "runs/tiny", "run directory")


def main(config):
    if config.name == "mistake":
        raise ValueError(f"name {config.name!r}\\nis taken: choose another")
    if config.name == "bug":
        raise RuntimeError("this is a bug")
    if config.name == "interrupt":
        raise KeyboardInterrupt
    print(config, WORKDIR.value)


if __name__ == "__main__":
    command_line.run(main)
'''

CONFIG = """
from __future__ import annotations

import dataclasses
import enum


class Rule(enum.Enum):
    GROUP = "group"
    REFERENCE = "reference"


@dataclasses.dataclass(frozen=True)
class Model:
    width: int = 8


@dataclasses.dataclass
class Grpo:
    group_size: int = 2
    clip: float = 0.2
    is_filtered: bool = True
    rule: Rule = Rule.GROUP
    ids: tuple[int, ...] = (1, 2)
    weights: dict[str, float] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass
class Config:
    grpo: Grpo = dataclasses.field(default_factory=Grpo)
    model: Model = Model()
    name: str = "tiny"


def get_config():
    return Config()
"""


@pytest.fixture
def call(tmp_path):
    (tmp_path / "experiment.py").write_text(EXPERIMENT)
    (tmp_path / "config.py").write_text(CONFIG)

    def run_experiment(*arguments):
        command = [sys.executable, "experiment.py", *arguments]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)

    return run_experiment


def test_typed_overrides_reach_main(call):
    result = call(
        "--config=config.py",
        "--config.grpo.group_size=4",
        "--config.grpo.clip=1",
        "--noconfig.grpo.is_filtered",
        "--config.grpo.rule=reference",
        "--config.grpo.ids=(3, 5, 7)",
        "--workdir=elsewhere",
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout == (
        "Config(grpo=Grpo(group_size=4, clip=1.0, is_filtered=False, rule=<Rule.REFERENCE: 'reference'>, "
        "ids=(3, 5, 7), weights={}), model=Model(width=8), name='tiny') elsewhere\n"
    )


def test_help_lists_the_flags_without_reading_the_config(call, tmp_path):
    (tmp_path / "broken.py").write_text("raise RuntimeError('read')")
    result = call("--config=broken.py", "--help")
    assert result.returncode == 0 and result.stderr == ""
    for told in ("A tiny experiment.", "--config:", "--workdir:"):
        assert told in result.stdout


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ([], "--config is missing: name a config file, such as --config=configs/smoke.py"),
        (["--config=absent.py"], "--config=absent.py is no Python file: name one such as configs/smoke.py"),
        (["--config=config.py", "--workdri=x"], "Unknown command line flag 'workdri'. Did you mean: workdir"),
        (["--config=config.py", "x=3"], "unexpected argument 'x=3': flags are written --name=value"),
        (
            ["--config=config.py", "--config.grpo.group_siz=4"],
            "--config.grpo.group_siz: config.grpo has no field 'group_siz'; did you mean group_size?",
        ),
        (
            ["--config=config.py", "--config.grpo.group_size=abc"],
            "--config.grpo.group_size is 'abc': give a value of type int",
        ),
        (
            ["--config=config.py", "--config.grpo.rule=none"],
            "--config.grpo.rule is 'none': give a value of type Rule, one of GROUP, REFERENCE",
        ),
        (["--config=config.py", "--config.grpo.ids=('a',)"], "--config.grpo.ids is ('a',): give a tuple[int, ...]"),
        (
            ["--config=config.py", "--config.grpo.weights=1"],
            "--config.grpo.weights: a field of type dict[str, float] is set in the config file only",
        ),
        (["--config=config.py", "--config.grpo=1"], "--config.grpo is a group of fields"),
        (["--config=config.py", "--config.model.width=4"], "--config.model.width: config.model is frozen"),
        (["--config=config.py", "--config.name=mistake"], "name 'mistake' is taken: choose another [experiment.py:11]"),
    ],
)
def test_a_mistake_is_one_sentence_and_exit_code_2(call, arguments, told):
    result = call(*arguments)
    assert result.returncode == 2
    assert result.stderr.startswith(f"error: {told}")
    assert result.stderr.count("\n") == 1 and result.stdout == ""


def test_a_bug_keeps_its_traceback(call):
    result = call("--config=config.py", "--config.name=bug")
    assert result.returncode == 1
    assert "Traceback" in result.stderr and "RuntimeError: this is a bug" in result.stderr


def test_verbosity_shows_where_a_mistake_came_from(call):
    result = call("--config=config.py", "--config.name=mistake", "--verbosity=1")
    assert result.returncode == 2
    assert "Traceback" in result.stderr and result.stderr.splitlines()[-1].startswith("error: name 'mistake'")


def test_ctrl_c_tells_how_to_go_on(call):
    result = call("--config=config.py", "--config.name=interrupt")
    assert result.returncode == 130
    assert "Traceback" not in result.stderr
    assert "experiment.py --config=config.py --config.name=interrupt" in result.stderr


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("x = 1\ndef get_config(:\n", "failed at line 2: SyntaxError: "),
        ("import no_such_module\n", "failed at line 1: ModuleNotFoundError: No module named 'no_such_module'"),
        ("def get_config():\n    return 1 / 0\n", "failed at line 2: ZeroDivisionError: division by zero"),
        ("import sys\nsys.exit(0)\n", "failed at line 2: SystemExit: 0"),
        ("config = 1\n", "has no function get_config()"),
        ("def get_config():\n    return {'a': 1}\n", "returned {'a': 1}: return a dataclass instance"),
        (
            "from orchestra_jax.config import RunConfig\n"
            "def get_config():\n    config = RunConfig()\n    config.grpo.num_step = 1\n    return config\n",
            "sets config.grpo.num_step, which is no field of the config",
        ),
    ],
)
def test_a_malformed_config_file_is_named_with_its_line(tmp_path, text, told):
    path = tmp_path / "broken.py"
    path.write_text(text)
    with pytest.raises(CommandLineError) as caught:
        load_config(str(path))
    assert f"--config={path}" in str(caught.value) and told in str(caught.value)
