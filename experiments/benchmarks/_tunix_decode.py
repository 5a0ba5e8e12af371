"""Decoding by google-tunix's sampler, for an interpreter that has it (pip install google-tunix==0.1.7). See decode.py.

Prints the CPU seconds of each batch as JSON, compiled beforehand.
"""

import json
import sys
import time


class Ids:
    """A tokenizer of decimal numbers: the sampler takes text."""

    def encode(self, text, **_):
        return list(map(int, text.split()))

    def decode(self, ids, **_):
        return " ".join(map(str, ids))

    def bos_id(self):
        return 0

    def eos_id(self):
        return 1

    def pad_id(self):
        return 0

    def dedup_bos_ids(self, ids):
        return ids


def main(task):
    import numpy as np
    from flax import nnx
    from tunix.generate import sampler
    from tunix.models.qwen3 import model as qwen3

    shape = task["shape"]
    config = qwen3.ModelConfig(
        num_layers=shape["layers"], vocab_size=shape["vocab_size"], embed_dim=shape["hidden"], hidden_dim=shape["mlp"],
        num_heads=shape["heads"], head_dim=shape["head_dim"], num_kv_heads=shape["kv_heads"], rope_theta=1_000_000,
        norm_eps=1e-6, use_tied_embedding=False,
    )  # fmt: skip
    model = qwen3.Qwen3(config, rngs=nnx.Rngs(0))
    longest = max(prompt + new for _, prompt, new in task["batches"])
    cache = sampler.CacheConfig(longest + 1, shape["layers"], shape["kv_heads"], shape["head_dim"])
    sample = sampler.Sampler(model, Ids(), cache)
    rng = np.random.default_rng(0)
    spent_s, seen = [], set()
    for num_rows, num_prompt, num_new in task["batches"]:
        rows = rng.integers(2, shape["vocab_size"], (num_rows, num_prompt - 1))
        texts = [" ".join(map(str, row)) for row in rows]
        how = {"max_generation_steps": num_new, "max_prompt_length": num_prompt, "temperature": task["temperature"]}
        how |= {"top_p": 1.0, "seed": 0} if task["temperature"] else {}
        if (num_rows, num_prompt, num_new) not in seen:
            seen.add((num_rows, num_prompt, num_new))
            sample(texts, eos_tokens=[-1], **how)
        start_s = time.process_time()
        sample(texts, eos_tokens=[-1], **how)
        spent_s.append(time.process_time() - start_s)
    print(json.dumps(spent_s))


main(json.loads(sys.argv[1]))
