"""The whole pipeline against a local server: what passes, why the rest does not, what it costs, and how it goes on."""

import json

import pytest

from orchestra_jax.data.synthesis import SynthesisConfig, generate_samples
from orchestra_jax.data.synthesis.domain_file import read_domain, read_tasks
from orchestra_jax.data.synthesis.pipeline import StageFailed
from orchestra_jax.data.synthesis.records import Brief
from orchestra_jax.environments.functions.success import judge, replay, run_gold
from orchestra_jax.tools.sandbox.python_sandbox import PythonSandbox
from tests.data.synthesis.bakery import BAD_FUNCTIONS, HARDER, KEPT, Bakery

BRIEF = Brief("bakery", "A bakery takes orders for cakes.")
CONFIG = SynthesisConfig(
    num_subjects=6, entries_per_subject=1, num_intents=10, num_attempts=2, max_turns=4, max_similarity=0.7
)
USD_PER_REPLY = 92e-6
EXPECTED = {  # stage: kept, reasons
    "subjects": (4, {"repeated": 1, "wrong form": 1}),
    "schema": (1, {"not JSON": 1, "no id": 1}),
    "data model": (1, {"other tables": 1, "bad reference": 1}),
    "entries": (3, {"dangling id": 1}),
    "entry checks": (2, {"not consistent": 1}),
    "functions": (
        5,
        {
            "fails in the sandbox": len(BAD_FUNCTIONS),
            "not deterministic": 1,
            "other arguments": 1,
            "no single def": 1,
            "no Python": 1,
            "examples refused": 1,
            "wrong form": 1,
        },
    ),
    "intents": (8, {"repeated": 1, "wrong form": 1}),
    "tasks": (6, {"unknown function": 1, "information given away": 1}),
    "evolution": (1, {"no harder": 4, "not JSON": 1}),
    "near-duplicates": (6, {"near-duplicate": 1}),
    "filter": (3, {"solved without action": 1, "golden calls fail": 1, "never solved": 1}),
}
KEPT_IDS = ["bakery/0", "bakery/7", "bakery/0/harder"]


def run(make_expert, directory):
    experts = (make_expert("writer"), make_expert("checker"), make_expert("solver"))
    return generate_samples(BRIEF, *experts, directory, CONFIG, should_show_progress=False)


def test_every_stage_accepts_and_rejects_and_a_second_run_asks_nobody(bakery, make_expert, tmp_path):
    samples = run(make_expert, tmp_path)
    made = {report.stage: (report.num_accepted, dict(report.reasons)) for report in samples.reports}
    assert made == EXPECTED
    assert [task.task_id for task in samples.tasks] == KEPT_IDS
    assert samples.tasks[0].scenario.reason_for_call == KEPT["reason_for_call"]
    assert (samples.tasks[2].difficulty, len(samples.tasks[2].gold_calls)) == (2, len(HARDER["actions"]))
    assert [each.name for each in samples.domain_file.functions] == [
        "get_order", "cancel_order", "count_cakes", "change_amount",
    ]  # fmt: skip

    num_requests = len(bakery.requests)
    assert samples.paid_usd == pytest.approx(num_requests * USD_PER_REPLY)
    report = json.loads((tmp_path / "report.json").read_text())
    assert sum(report["costs_usd"].values()) == pytest.approx(samples.paid_usd)
    assert set(report["costs_usd"]) == set(EXPECTED) - {"near-duplicates"}
    receipts = [json.loads(line) for line in (tmp_path / "receipts.jsonl").read_text().splitlines()]
    assert len(receipts) == num_requests and {each["model"] for each in receipts} == {"writer", "checker", "solver"}
    table = (tmp_path / "report.md").read_text()
    assert "| entries | 4 | 3 | 0.75 |" in table and "never solved 1" in table

    again = run(make_expert, tmp_path)
    assert len(bakery.requests) == num_requests and again.paid_usd == 0.0
    assert (again.tasks, again.domain_file) == (samples.tasks, samples.domain_file)
    check_files(tmp_path, samples)


def check_files(directory, samples):
    """What was written is the domain and the tasks again, and its golden calls score 1, nothing 0."""
    assert read_domain(directory / "domain.json") == samples.domain_file
    tasks = read_tasks(directory / "tasks.jsonl")
    assert tasks == samples.tasks
    with PythonSandbox(timeout_s=4.0) as sandbox:
        domain = samples.domain_file.open(sandbox)
        for task in tasks:
            gold = run_gold(domain, task)
            database, _ = replay(domain, task.gold_calls)
            assert judge(gold, task, database, task.communicate_info).outcome == 1.0
            assert judge(gold, task, domain.open_database(), ()).outcome == 0.0


@pytest.mark.slow
def test_a_run_that_was_cut_off_goes_on_where_it_stopped(bakery, make_expert, tmp_path):
    whole, answered = bakery.bakery, []

    class CutOff:
        def respond(self, system, user):
            if len(answered) >= 9:
                raise ConnectionError("the server is gone")
            answered.append((system, user))
            return whole.respond(system, user)

    bakery.bakery = CutOff()
    respond = bakery.respond

    def respond_or_fail(body):
        try:
            return respond(body)
        except ConnectionError:
            return 500, "application/json", b"{}"

    bakery.respond = respond_or_fail
    with pytest.raises(StageFailed, match="the stage 'entr"):
        run(make_expert, tmp_path)
    assert "no reply" in (tmp_path / "report.md").read_text()
    num_before = len(bakery.requests)
    bakery.bakery, bakery.respond = Bakery(), respond
    bakery.bakery.num_asked = whole.num_asked  # the server goes on with its lists
    samples = run(make_expert, tmp_path)
    assert [task.task_id for task in samples.tasks] == KEPT_IDS
    asked_again = [tuple(m["content"] for m in body["messages"]) for _, _, body in bakery.requests[num_before:]]
    sampled = {each for each in answered if answered.count(each) > 1}  # schema and data model: samples of one text
    assert not {each for each in answered if each not in sampled} & set(asked_again)
    receipts = [json.loads(line) for line in (tmp_path / "receipts.jsonl").read_text().splitlines()]
    assert sum(receipt["is_cache_hit"] for receipt in receipts) == len(answered)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [({"num_subjects": 0}, "num_subjects 0 must be 1"), ({"max_similarity": -0.1}, "max_similarity -0.1 must be 0")],
)
def test_a_size_that_is_none_is_refused(arguments, told):
    with pytest.raises(ValueError, match=told):
        SynthesisConfig(**arguments)
    with pytest.raises(ValueError, match="needs a name that is an identifier"):
        Brief("a bakery", "cakes")
