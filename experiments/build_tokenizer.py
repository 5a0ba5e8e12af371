"""Makes the small tokenizer: a byte-level BPE of the simulated world's vocabulary, with the Qwen3 control tokens.

    python -m experiments.build_tokenizer --tokenizer_directory=orchestra_jax/assets/small_tokenizer

Writes tokenizer.json (same texts, same bytes); tokenizer_config.json beside it, the Qwen3 chat template, is fixed.
Units are split off before the BPE and are vocabulary entries of their own (`ignore_merges`: a piece that is an entry
needs no merges); what lies between them merges across words.
"""

import itertools
import json
import pathlib
import re

from absl import app, flags
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from orchestra_jax.chat import CONTROL_SPELLINGS, SMALL_TOKENIZER_DIRECTORY
from orchestra_jax.data.preferences import PREFERENCES
from orchestra_jax.data.questions import FAMILIES, build_tasks
from orchestra_jax.experts.catalog import EXPERTS, ROLES

_DIRECTORY = flags.DEFINE_string("tokenizer_directory", str(SMALL_TOKENIZER_DIRECTORY), "Holds the tokenizer.json.")

VOCAB_SIZE = 1024  # at most, control tokens included
NUM_PER_CELL = 300  # training questions of each family and kind
MIN_FREQUENCY = 10  # keeps the names in a question from merging with its phrase: unseen names need the phrase alone

ALIASES = [expert.alias for expert in EXPERTS]
SKELETONS = [f'\n{{"name": "{role}", "arguments": {{"model": "' for role in ROLES] + ['"}}\n']
PRICES = ["0.2", "1", "5", "15", "25"]
LATENCIES = ["2", "10", "25", "60", "90"]
WORDS = [*PREFERENCES, "remote", "price", "time", *FAMILIES, *dict.fromkeys(itertools.chain(*FAMILIES.values()))]
OBSERVATIONS = ["documents found", "no documents", "program printed", "program failed", "no output"]

UNITS = [*SKELETONS, "user\n", "assistant\n", "system\n", "\n\n", *ALIASES, *OBSERVATIONS]
# An alias is one token wherever it stands: in the prompt, in a thought, in a call. So the spaces around it belong to
# its neighbours. As three tokens (bare, behind a space, behind a line break) it had to be learned three times
# (docs/log.md).
UNITS += [f" ${price} " for price in PRICES] + [f" {latency}s " for latency in LATENCIES]
UNITS += [prefix + word for prefix in ("", " ") for word in WORDS]
PATTERN = "|".join(map(re.escape, SKELETONS))
PATTERN += rf"|\b(?:user|assistant|system)\n|\b(?:{'|'.join(ALIASES)})\b|\b(?:{'|'.join(OBSERVATIONS)})\b"
PATTERN += rf"| \$(?:{'|'.join(map(re.escape, PRICES))}) | (?:{'|'.join(LATENCIES)})s "
PATTERN += rf"| ?\b(?:{'|'.join(WORDS)})\b|[0-9]|\n\n?"


def sample_texts() -> list[str]:
    """What the policy reads besides units: questions, and preferences as often as questions."""
    questions = [task.question for task in build_tasks("train", NUM_PER_CELL, seed=0)]
    fixed = [preference.text for preference in PREFERENCES.values()]
    return questions + fixed * (len(questions) // len(fixed))


def build(texts: list[str], units: list[str] = UNITS, pattern: str = PATTERN) -> str:
    """The text of tokenizer.json for a tokenizer trained on `texts`; a unit, found by the pattern, is one token."""
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pattern), "removed"), byte_level])
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE - len(units) - len(CONTROL_SPELLINGS),
        min_frequency=MIN_FREQUENCY,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    trained.train_from_iterator(texts, trainer)
    vocab, merges = (json.loads(trained.to_str())["model"][key] for key in ("vocab", "merges"))
    for unit in units:
        vocab.setdefault(byte_level.pre_tokenize_str(unit)[0][0], len(vocab))
    tokenizer = Tokenizer(models.BPE(vocab, [tuple(merge) for merge in merges], ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pattern), "isolated"), byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    for spelling in CONTROL_SPELLINGS.values():
        tokenizer.add_tokens([AddedToken(spelling, normalized=False, special=spelling.startswith("<|"))])
    return tokenizer.to_str() + "\n"


def main(_):
    pathlib.Path(_DIRECTORY.value, "tokenizer.json").write_text(build(sample_texts()), encoding="utf-8")


if __name__ == "__main__":
    app.run(main)
