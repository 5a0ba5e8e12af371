"""The command line that builds an index, and the one that measures recall on a labelled set."""

import gzip
import json
import pathlib
import subprocess
import sys

from orchestra_jax.tools.search.document_index import DocumentIndex

REPOSITORY = pathlib.Path(__file__).parents[2]


def run(module, *flags):
    command = [sys.executable, "-m", f"experiments.{module}", *flags]
    return subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)


def test_an_index_is_built_once_and_a_mistake_is_one_sentence(tmp_path):
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_text("".join(json.dumps({"id": i, "title": i, "text": f"about {i}"}) + "\n" for i in ("cats", "dogs")))
    flags = (f"--corpus={corpus}", f"--index={tmp_path / 'index'}")
    done = run("build_index", *flags)
    assert done.returncode == 0 and done.stdout == f"2 documents in {tmp_path / 'index'}\n", done.stderr
    assert DocumentIndex(tmp_path / "index").search("cats", 1)[0][0].document_id == "cats"
    again = run("build_index", *flags)
    assert again.returncode == 2 and again.stderr.startswith("build_index: ") and "is not empty" in again.stderr


def test_recall_by_hand(tmp_path):
    documents = [{"id": str(i), "title": f"topic{i}", "content": "words"} for i in range(20)]
    with gzip.open(tmp_path / "documents.json.gz", "wt") as file:
        json.dump(documents, file)
    tasks = [
        {"user_scenario": {"instructions": "topic3 topic4"}, "required_documents": ["3", "4"]},
        {"user_scenario": {"instructions": "topic5"}, "required_documents": ["5", "6"]},
        {"user_scenario": {"instructions": "nothing"}, "required_documents": None},
    ]
    (tmp_path / "tasks.json").write_text(json.dumps(tasks))
    done = run("retrieval_recall", f"--folder={tmp_path}")
    assert done.stdout == "bm25: recall@10 0.750 over 2 tasks\n", done.stderr
