"""The command synthesises against a server, and a mistake is one sentence and exit code 2."""

import json

import pytest
from absl import flags
from absl.testing import flagsaver

from experiments import synthesize
from tests.data.synthesis.conftest import bakery, completion, endpoint  # noqa: F401


@pytest.fixture
def files(bakery, tmp_path):  # noqa: F811
    entry = {"endpoint": bakery.url, "model": "m", "max_retries": 0, "timeout_s": 300.0}
    (tmp_path / "endpoints.json").write_text(json.dumps({"gpt-5": entry}))
    (tmp_path / "bakery.txt").write_text("A bakery takes orders for cakes.")
    return tmp_path


def run(files, **changes):
    values = {
        "name": "bakery",
        "description": str(files / "bakery.txt"),
        "endpoints": str(files / "endpoints.json"),
        "writer": "gpt-5",
        "output_directory": str(files / "out"),
        "setting": ["num_subjects=6", "num_intents=10", "num_attempts=2", "max_turns=4", "max_similarity=0.7"],
    }
    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()
    with flagsaver.flagsaver(**{**values, **changes}):
        synthesize.main(None)


@pytest.mark.slow
def test_one_model_in_all_three_parts(files, capsys):
    run(files)
    told = capsys.readouterr().out
    assert "| filter | 6 | 3 | 0.50 |" in told and "3 tasks in" in told
    assert len((files / "out" / "tasks.jsonl").read_text().splitlines()) == 3


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"writer": "gpt-6"}, "'gpt-6' has no endpoint"),
        ({"setting": ["num_subject=3"]}, "--setting=num_subject is none of num_subjects"),
        ({"setting": ["num_subjects=0"]}, "num_subjects 0 must be 1 or more"),
        ({"description": "/nowhere.txt"}, "/nowhere.txt cannot be read"),
        ({"name": "my bakery"}, "the domain 'my bakery' needs a name"),
    ],
)
def test_a_mistake_is_one_sentence(files, capsys, changes, told):
    with pytest.raises(SystemExit) as caught:
        run(files, **changes)
    assert caught.value.code == 2 and told in capsys.readouterr().err
