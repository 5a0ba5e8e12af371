"""Makes the tokenizer of configs/quickstart_functions.py: numbers of entries, verbs and calls are one token each.

    python -m experiments.build_functions_tokenizer

Writes tokenizer.json; tokenizer_config.json beside it, the Qwen3 chat template, is fixed. The method is that of
build_tokenizer.py.
"""

import pathlib
import re

from absl import app, flags

from experiments.build_tokenizer import build
from orchestra_jax.chat import SMALL_TOKENIZER_DIRECTORY
from orchestra_jax.data.preferences import PREFERENCES

_DIRECTORY = flags.DEFINE_string(
    "functions_tokenizer_directory",
    str(SMALL_TOKENIZER_DIRECTORY.parent / "functions_tokenizer"),
    "Holds the tokenizer.json.",
)

MAX_CALLS = 8
COUNTS = {"B": 40, "M": 20, "S": 40}  # books, members, shelves
NUMBERS = [f"{kind}{number + 1}" for kind, count in COUNTS.items() for number in range(count)]
VERBS = ["lend", "return", "renew", "reserve", "where", "want"]
OPENINGS = [
    f'\n{{"name": "{name}", "arguments": {{"book_id": "'
    for name in ("lend", "take_back", "renew", "reserve", "drop_reservation", "get_book")
]
OPENINGS.append('\n{"name": "tell_user", "arguments": {"text": "')
SKELETONS = [*OPENINGS, '", "member_id": "', '"}}\n']
CALLS = [f"calls {number + 1}" for number in range(MAX_CALLS)]
FIXED = [*CALLS, *(preference.text for preference in PREFERENCES.values()), "Thank you, that is all."]
WORDS = ["done", "no", *VERBS]

UNITS = [*SKELETONS, "user\n", "assistant\n", "system\n", *FIXED, *NUMBERS, *WORDS, "\n", "\n\n", " "]
PATTERN = "|".join(map(re.escape, SKELETONS))
PATTERN += rf"|\b(?:user|assistant|system)\n|{'|'.join(map(re.escape, FIXED))}"
PATTERN += rf"|\b(?:{'|'.join(sorted(NUMBERS, key=len, reverse=True))})\b|\b(?:{'|'.join(WORDS)})\b|[0-9]| |\n\n?"


def main(_):
    pathlib.Path(_DIRECTORY.value, "tokenizer.json").write_text(build([" "], UNITS, PATTERN), encoding="utf-8")


if __name__ == "__main__":
    app.run(main)
