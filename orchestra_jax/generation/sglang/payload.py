"""What is sent to SGLang's /generate and what comes back, in tokens. No HTTP here.

A reply is believed only if it is whole: ids within the vocabulary, each with a finite log-probability and a version of
the weights. Log-probabilities are SGLang's own: after the temperature, before top-k, top-p and min-p. Replies of a
stream tell all tokens so far or, under --incremental-streaming-output, the new ones alone: their count says which.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

from orchestra_jax.generation.engine import Sampling
from orchestra_jax.seeds import derive_seed

UNKNOWN_VERSION = -1  # of a label that is no number: weights that nobody here has sent


class UnreadableReply(Exception):
    """A reply that is no answer to what was asked."""


@dataclasses.dataclass(frozen=True)
class Part:
    """Tokens that a server sampled behind what it was given, each with what was recorded with it.

    `finish` is "" while a stream goes on, else the server's own word: "stop", "length" or "abort".
    """

    tokens: list[int]
    logprobs: list[float]
    versions: list[int]
    finish: str

    def head(self, num_tokens: int) -> Part:
        """The first tokens alone."""
        return Part(self.tokens[:num_tokens], self.logprobs[:num_tokens], self.versions[:num_tokens], self.finish)

    def tail(self, num_tokens: int) -> Part:
        """What stands behind the first `num_tokens`."""
        return Part(self.tokens[num_tokens:], self.logprobs[num_tokens:], self.versions[num_tokens:], self.finish)


def generate_payload(
    tokens: Sequence[int], sampling: Sampling, max_new_tokens: int, rid: str, seed_name: str, is_streaming: bool
) -> dict[str, object]:
    """The body of /generate for the stream `tokens`.

    rid: the request's name at the server, unique for each attempt. seed_name: what `sampling.seed` is folded with; it
    has an effect with --enable-deterministic-inference alone.
    """
    return {
        "rid": rid,
        "input_ids": [int(token) for token in tokens],
        "sampling_params": {
            "max_new_tokens": max_new_tokens,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "top_k": sampling.top_k or -1,
            "min_p": sampling.min_p,
            "stop_token_ids": sorted(int(token) for token in sampling.stop_ids),
            "no_stop_trim": True,
            "skip_special_tokens": False,
            "sampling_seed": derive_seed(sampling.seed, seed_name) >> 32,
        },
        "return_logprob": True,
        "stream": is_streaming,
    }


def parse_part(reply: object, num_known: int, max_new_tokens: int, vocab_size: int) -> Part:
    """What one reply of /generate adds to the `num_known` tokens that earlier ones of its stream told.

    UnreadableReply for anything that is not whole.
    """
    try:
        about = reply["meta_info"]
        count, finish = about["completion_tokens"], about["finish_reason"]
        tokens, triples = list(reply["output_ids"]), list(about.get("output_token_logprobs") or ())
        kind = "" if finish is None else finish["type"]
        spans = about.get("weight_versions") or [{"version": about["weight_version"], "start": 0, "end": count}]
        num_skipped = num_known if len(tokens) == count else 0
        versions = _versions(spans, count)[num_known:]
        logprobs = [float(logprob) for logprob, *_ in triples[num_skipped:]]
        ids = [token for _, token, *_ in triples[num_skipped:]]
        tokens = tokens[num_skipped:]
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise UnreadableReply(f"no reply of /generate: {type(error).__name__} {error}") from error
    if kind not in ("", "stop", "length", "abort"):
        raise UnreadableReply(f"finish_reason {kind!r} is not known")
    if not len(tokens) == len(versions) == len(logprobs) or ids != tokens or num_known + len(tokens) > max_new_tokens:
        raise UnreadableReply(
            f"{num_known} + {len(tokens)} tokens of {max_new_tokens} at most, {len(logprobs)} log-probabilities and "
            f"{len(versions)} versions, which do not fit each other"
        )
    if not all(type(token) is int and 0 <= token < vocab_size for token in tokens):
        raise UnreadableReply(f"token ids that are not all in [0, {vocab_size})")
    if not all(math.isfinite(logprob) and logprob < 1e-3 for logprob in logprobs):  # rounding passes 0 by a little
        raise UnreadableReply("log-probabilities that are none")
    return Part(tokens, logprobs, versions, kind)


def _versions(spans: Sequence[dict], count: int) -> list[int]:
    """The version of each of `count` tokens; spans that do not cover them leave the list too short."""
    versions: list[int] = []
    for span in spans:
        label = str(span["version"])
        if span["start"] != len(versions):
            break
        # ASCII digits alone: int() would read other scripts' too.
        number = int(label) if label.isascii() and label.isdigit() else UNKNOWN_VERSION
        versions += [number] * (min(int(span["end"]), count) - len(versions))
    return versions


def find_sequence(tokens: Sequence[int], num_known: int, sequences: Sequence[Sequence[int]]) -> int:
    """Where the first stop sequence that ends behind `num_known` ends, in tokens; 0 if there is none."""
    ends = [
        end
        for end in range(num_known + 1, len(tokens) + 1)
        if any(len(each) <= end and list(tokens[end - len(each) : end]) == list(each) for each in sequences)
    ]
    return ends[0] if ends else 0
