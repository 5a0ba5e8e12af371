"""Synthesises a function-calling domain and its tasks from a description, with any OpenAI-compatible endpoints.

    python -m experiments.synthesize --name=bakery --description=bakery.txt --endpoints=endpoints.json --writer=gpt-5 \\
        --checker=gpt-5-mini --solver=gpt-5 --output_directory=runs/bakery --spend_cap_usd=20

`endpoints.json` is what `--config.experts.endpoints_path` of a training takes; the three may be one model. The same
command goes on where it was stopped. What it writes: orchestra_jax/data/synthesis/pipeline.py.
"""

import dataclasses
import json
import pathlib
import sys

from absl import app, flags

_NAME = flags.DEFINE_string("name", None, "The domain's name, an identifier.")
_DESCRIPTION = flags.DEFINE_string("description", None, "A text file that describes the domain.")
_ENDPOINTS = flags.DEFINE_string("endpoints", None, "Endpoints by model, JSON.")
_WRITER = flags.DEFINE_string("writer", None, "The model that writes.")
_CHECKER = flags.DEFINE_string("checker", None, "The model that reviews entries; the writer if not given.")
_SOLVER = flags.DEFINE_string("solver", None, "The model that tries the tasks; the writer if not given.")
_DIRECTORY = flags.DEFINE_string("output_directory", None, "Where everything goes.")
_CAP = flags.DEFINE_float("spend_cap_usd", 0.0, "Real money that this run may spend.")
_OPTIONS = flags.DEFINE_multi_string("setting", [], "name=number for a field of SynthesisConfig.")


def main(_):
    try:
        synthesize()
    except ValueError as error:
        print(f"synthesize: {error}", file=sys.stderr)
        sys.exit(2)


def synthesize() -> None:
    from orchestra_jax.data.synthesis.pipeline import SynthesisConfig, generate_samples
    from orchestra_jax.data.synthesis.records import Brief
    from orchestra_jax.data.synthesis.report import render_report
    from orchestra_jax.experts.endpoint import load_endpoints
    from orchestra_jax.tools.budget import Account

    account = Account(_CAP.value)
    account.keep_in(pathlib.Path(_DIRECTORY.value) / "spending.json")
    endpoints = load_endpoints(_ENDPOINTS.value, _models_in(_ENDPOINTS.value), account)
    names = [_WRITER.value, _CHECKER.value or _WRITER.value, _SOLVER.value or _WRITER.value]
    if missing := sorted(set(names) - set(endpoints)):
        raise ValueError(f"{missing[0]!r} has no endpoint in {_ENDPOINTS.value}: choose among {sorted(endpoints)}")
    types = {field.name: type(field.default) for field in dataclasses.fields(SynthesisConfig)}
    options = dict(option.partition("=")[::2] for option in _OPTIONS.value)
    if unknown := sorted(set(options) - set(types)):
        raise ValueError(f"--setting={unknown[0]} is none of {', '.join(types)}")
    config = SynthesisConfig(**{name: types[name](value) for name, value in options.items()})
    try:
        description = pathlib.Path(_DESCRIPTION.value).read_text(encoding="utf-8")
    except OSError as error:
        raise ValueError(f"the description {_DESCRIPTION.value} cannot be read: {error.strerror}") from error
    models = [endpoints[name] for name in names]
    samples = generate_samples(Brief(_NAME.value, description), *models, _DIRECTORY.value, config)
    print(render_report(samples.reports, {}))
    print(f"{len(samples.tasks)} tasks in {_DIRECTORY.value}, ${samples.paid_usd:.4f} paid")


def _models_in(path: str) -> list[str]:
    """Any model of the file may write; of a file that is none, load_endpoints says what is wrong."""
    try:
        return list(json.loads(pathlib.Path(path).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return []


if __name__ == "__main__":
    flags.mark_flags_as_required(["name", "description", "endpoints", "writer", "output_directory"])
    app.run(main)
