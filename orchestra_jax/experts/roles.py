"""What an expert is asked in each role, and how the query, the program or the answer is read out of its reply."""

from __future__ import annotations

import re

from orchestra_jax.experts.expert import ExpertRequest

INSTRUCTIONS = {
    "search": (
        "Write one query for a keyword search engine, such that the documents it finds let somebody answer the "
        "question. Do not answer. Reply with the query alone, on one line."
    ),
    "enhance_reasoning": (
        "Write one Python program, with the standard library alone, that computes what the question asks for and "
        "prints the result and nothing else. Reply with the program in one ```python code block."
    ),
    "answer": (
        "Answer the question. Use the evidence where there is any. Give the final answer alone, without a sentence "
        "around it, between <answer> and </answer>."
    ),
}

_PYTHON_BLOCK = re.compile(r"```(?:python|py)[ \t]*\n(.*?)```", re.DOTALL | re.IGNORECASE)
_ANY_BLOCK = re.compile(r"```[^\n]*\n(.*?)```", re.DOTALL)
_ANSWER = re.compile(r"<answer>(.*?)</answer>", re.DOTALL | re.IGNORECASE)


def render_messages(request: ExpertRequest) -> list[dict[str, str]]:
    """The request as chat messages: the role's instruction, then the question and the evidence so far."""
    text = f"Question: {request.instance.task.question}"
    if request.evidence.text:
        text += f"\n\nEvidence:\n{request.evidence.text}"
    return [{"role": "system", "content": INSTRUCTIONS[request.role]}, {"role": "user", "content": text}]


def extract(role: str, content: str) -> str:
    """The query, program or answer in an endpoint's reply; empty if there is none.

    Thinking up to a closing </think> is left out. A program stands in the first Python code block, else in the first
    block, else it is the whole text; an answer stands in the last <answer>, else on the last line; a query on the
    first.
    """
    text = content.rsplit("</think>", 1)[-1].strip()
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if role == "enhance_reasoning":
        block = _PYTHON_BLOCK.search(text) or _ANY_BLOCK.search(text)
        return block[1].strip("\n") if block else text
    if role == "answer":
        answers = _ANSWER.findall(text)
        return (answers or lines or [""])[-1].strip()
    return lines[0].strip("\"'`") if lines else ""
