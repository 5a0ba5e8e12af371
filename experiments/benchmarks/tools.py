"""What tools, sandbox and search cost: CPU time where it can be told, and programs a second on the wall.

    python -c "from experiments.benchmarks.tools import run; print(run('toolbox,sandbox'))"
    python -c "from experiments.benchmarks.tools import run; print(run('search', 1_000_000))"

The documents of the search are synthetic: words drawn by Zipf's law from a vocabulary of 200,000, 20 to 60 a document.
Queries are four words, half of them among the 1,000 most frequent. Vectors lie around 1,000 centres, or anywhere.
"""

from __future__ import annotations

import asyncio
import functools
import pathlib
import shutil
import subprocess
import sys
import tempfile
import time

import numpy as np

from orchestra_jax.data.records import Document, Instance, Preference, Task
from orchestra_jax.tools.ledger import make_receipt
from orchestra_jax.tools.limits import Limits
from orchestra_jax.tools.sandbox.isolation import LEVELS, missing
from orchestra_jax.tools.sandbox.python_sandbox import PythonSandbox
from orchestra_jax.tools.search.dense_search import unit
from orchestra_jax.tools.search.document_index import DocumentIndex, build_index
from orchestra_jax.tools.tool import Evidence, ToolContext, ToolResult
from orchestra_jax.tools.toolbox import Toolbox
from orchestra_jax.types import ToolCall

NUM_WORDS = 200_000
NUM_DIMS = 384
NUM_QUERIES = 50
PROBES = (32, 128, 512, 2_048)  # lists that a query looks at


def run(parts: str = "toolbox,sandbox,search,vectors", num_documents: int = 100_000) -> dict[str, float]:
    """The figures of some parts by name, units in the names. ValueError for a part that is none."""
    measures = {
        "toolbox": measure_toolbox,
        "sandbox": measure_sandbox,
        "search": lambda: measure_search(num_documents),
        "vectors": lambda: measure_vectors(num_documents),
        "uniform_vectors": lambda: measure_vectors(num_documents, num_centres=0),
    }
    if unknown := sorted(set(parts.split(",")) - set(measures)):
        raise ValueError(f"parts {unknown} are not among {sorted(measures)}")
    return {name: value for part in parts.split(",") for name, value in measures[part]().items()}


class _Nothing:
    name = "nothing"
    description = "Does nothing."
    parameters_schema = {
        "type": "object",
        "properties": {"model": {"type": "string"}},
        "required": ["model"],
        "additionalProperties": False,
    }
    receipt = make_receipt("nothing", service_s=0.0)

    async def run(self, arguments, context):
        return ToolResult("done", "done", self.receipt)


def measure_toolbox(num_calls: int = 2_000) -> dict[str, float]:
    """CPU microseconds of a call beyond the tool itself, one by one and 1,000 at once, without and with limits."""
    task = Task("t", "arithmetic", "small", "", "", "search")
    context = ToolContext(Instance("i", task, Preference("any", "", {}), (), 0), 0, Evidence())
    call, tool = ToolCall("nothing", {"model": "expert-1"}), _Nothing()
    plain = Toolbox([tool], 30.0)
    limited = Toolbox([tool], 30.0, {"nothing": Limits(30.0, max_concurrent=64, max_attempts=3)})

    async def one_by_one(run_one):
        for _ in range(num_calls):
            await run_one()

    async def at_once(box):
        await asyncio.gather(*(box.call(call, context) for _ in range(1_000)))

    def cpu_us(coroutine, count):
        start_s = time.process_time()
        asyncio.run(coroutine)
        return (time.process_time() - start_s) / count * 1e6

    own = cpu_us(one_by_one(lambda: tool.run(call.arguments, context)), num_calls)
    return {
        "toolbox/overhead_us": cpu_us(one_by_one(lambda: plain.call(call, context)), num_calls) - own,
        "toolbox/overhead_with_limits_us": cpu_us(one_by_one(lambda: limited.call(call, context)), num_calls) - own,
        "toolbox/overhead_of_1000_at_once_us": cpu_us(at_once(plain), 1_000) - own,
        "toolbox/overhead_of_1000_at_once_with_limits_us": cpu_us(at_once(limited), 1_000) - own,
    }


def measure_sandbox(num_programs: int = 100) -> dict[str, float]:
    """Programs a second of wall-clock time behind a warm server; with `perf` the CPU of one, all processes included.

    A runner is reaped by the kernel, so that no rusage knows what it cost. The start of interpreter and server is taken
    out by a second run of a single program.
    """
    figures = {}
    for level in (level for level in LEVELS if not missing(level)):
        with PythonSandbox(isolation=level) as sandbox:
            start_s = run_programs(sandbox, 1)
            run_programs(sandbox, num_programs)
            figures[f"sandbox/{level}/programs_per_s"] = num_programs / (time.monotonic() - start_s)
        if shutil.which("perf"):
            alone_ms, all_ms = (_cpu_ms(level, count) for count in (1, num_programs + 1))
            figures[f"sandbox/{level}/cpu_ms_per_program"] = (all_ms - alone_ms) / num_programs
    return figures


def run_programs(sandbox: PythonSandbox, count: int) -> float:
    """Runs `count` different programs, one after another; returns the monotonic clock behind them."""
    for number in range(count):
        assert sandbox.run(f"print({number} ** 2, {count})").stdout == f"{number**2} {count}\n"
    return time.monotonic()


def _cpu_ms(level: str, count: int) -> float:
    """CPU milliseconds of an interpreter that runs so many programs, and of all that it starts."""
    script = (
        "from experiments.benchmarks.tools import PythonSandbox, run_programs\n"
        f"with PythonSandbox(isolation={level!r}) as sandbox:\n    run_programs(sandbox, {count})\n"
    )
    command = ["perf", "stat", "-x,", "-e", "task-clock", sys.executable, "-c", script]
    told = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    return float(told.split(",", 1)[0])


def measure_search(num_documents: int) -> dict[str, float]:
    """CPU of building and opening an index of words, and of a query: the median of NUM_QUERIES, behind a first one."""
    rng = np.random.default_rng(0)
    queries = [" ".join([*_words(rng, 2, 1_000), *_words(rng, 2, NUM_WORDS)]) for _ in range(NUM_QUERIES)]
    with tempfile.TemporaryDirectory() as scratch:
        directory = pathlib.Path(scratch) / "index"
        start_s = time.process_time()
        build_index(directory, _documents(num_documents))
        built_s = time.process_time() - start_s
        return {"search/build_cpu_s": built_s, **measure_queries(directory, queries)}


def measure_queries(directory: pathlib.Path, queries: list[str]) -> dict[str, float]:
    start_s = time.process_time()
    index = DocumentIndex(directory)
    opened_s = time.process_time() - start_s
    return {
        "search/num_documents": index.num_documents,
        "search/open_cpu_s": opened_s,
        "search/query_cpu_ms": _median_ms(lambda query: index.search(query, 10), queries),
    }


def measure_vectors(num_documents: int, num_centres: int = 1_000) -> dict[str, float]:
    """The same for short texts with vectors of NUM_DIMS dimensions, their embedding not counted; and recall at 10.

    recall = mean share of the 10 nearest vectors, found by comparing with all of them, that a query finds. The vectors
    lie around `num_centres` centres, half of a vector's square being its own; with 0 they are uniform on the sphere,
    which no encoder's are: the worst case for lists.
    """
    rng = np.random.default_rng(0)
    centres = rng.standard_normal((num_centres, NUM_DIMS), np.float32)

    def draw(count: int) -> np.ndarray:
        vectors = rng.standard_normal((count, NUM_DIMS), np.float32)
        return unit(vectors + centres[rng.integers(num_centres, size=count)] if num_centres else vectors)

    asked_QD = draw(NUM_QUERIES)
    nearest = [(np.empty(0, int), np.empty(0, np.float32)) for _ in asked_QD]
    num_seen = 0

    def embed(texts):
        nonlocal num_seen
        vectors_ND = draw(len(texts))
        for q, scores_N in enumerate(asked_QD @ vectors_ND.T):
            numbers = np.concatenate([nearest[q][0], np.arange(num_seen, num_seen + len(texts))])
            scores = np.concatenate([nearest[q][1], scores_N])
            best = np.argpartition(-scores, 9)[:10]
            nearest[q] = numbers[best], scores[best]
        num_seen += len(texts)
        return vectors_ND

    def answer(queries):
        return asked_QD[[int(query) for query in queries]]

    def documents():
        for number in range(num_documents):
            yield Document(str(number), f"w{number % 1_000}", f"w{number}")

    with tempfile.TemporaryDirectory() as scratch:
        directory = pathlib.Path(scratch) / "index"
        start_s = time.process_time()
        build_index(directory, documents(), embed)
        built_s = time.process_time() - start_s
        start_s = time.process_time()
        DocumentIndex(directory, "dense", answer)
        opened_s = time.process_time() - start_s
        queries = [str(number) for number in range(NUM_QUERIES)]
        figures = {
            "num_documents": num_documents,
            "file_bytes": (directory / "dense.faiss").stat().st_size,
            "build_cpu_s": built_s,
            "open_cpu_s": opened_s,
        }
        for num_probes in PROBES:
            index = DocumentIndex(directory, "dense", answer, num_probes=num_probes)
            found = [{int(document.document_id) for document, _ in index.search(query, 10)} for query in queries]
            shares = [len(each & set(numbers)) / 10 for each, (numbers, _) in zip(found, nearest)]
            figures[f"recall_of_{num_probes}_lists"] = float(np.mean(shares))
            find = functools.partial(index.search, num_results=10)
            figures[f"query_cpu_ms_of_{num_probes}_lists"] = _median_ms(find, queries)
        return {f"vectors/{num_centres}_centres/{name}": value for name, value in figures.items()}


def _median_ms(ask, queries) -> float:
    ask(queries[0])
    seconds = []
    for query in queries:
        start_s = time.process_time()
        ask(query)
        seconds.append(time.process_time() - start_s)
    return float(np.median(seconds)) * 1e3


def _documents(num_documents: int):
    rng = np.random.default_rng(1)
    for number in range(num_documents):
        words = _words(rng, int(rng.integers(20, 60)), NUM_WORDS)
        yield Document(str(number), words[0], " ".join(words))


def _words(rng: np.random.Generator, count: int, most: int) -> list[str]:
    """Words by rank, frequency falling with it: exp(uniform) has the density 1 / rank."""
    ranks = np.exp(rng.random(count) * np.log(most)).astype(int)
    return [f"w{rank}" for rank in ranks]
