"""Decoding by transformers' generate on CPU torch, for an interpreter that has both. See decode.py.

Prints the CPU seconds of each batch as JSON, after a first one to warm up.
"""

import json
import os
import sys
import time


def main(task):
    import torch
    import transformers

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    torch.manual_seed(0)
    shape = task["shape"]
    config = transformers.Qwen3Config(
        vocab_size=shape["vocab_size"], hidden_size=shape["hidden"], intermediate_size=shape["mlp"],
        num_hidden_layers=shape["layers"], num_attention_heads=shape["heads"], num_key_value_heads=shape["kv_heads"],
        head_dim=shape["head_dim"], tie_word_embeddings=False,
    )  # fmt: skip
    model = transformers.Qwen3ForCausalLM(config).eval().float()
    how = {"do_sample": task["temperature"] > 0, "pad_token_id": 0, "eos_token_id": None}
    how |= {"temperature": task["temperature"], "top_k": 0} if task["temperature"] else {}

    def generate(num_rows, num_prompt, num_new):
        tokens = torch.randint(2, shape["vocab_size"], (num_rows, num_prompt))
        with torch.no_grad():
            model.generate(
                tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=num_new, min_new_tokens=num_new, **how
            )

    generate(2, 8, 4)
    spent_s = []
    for batch in task["batches"]:
        start_s = time.process_time()
        generate(*batch)
        spent_s.append(time.process_time() - start_s)
    print(json.dumps(spent_s))


main(json.loads(sys.argv[1]))
