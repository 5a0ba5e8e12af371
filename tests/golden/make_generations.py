"""Writes generations.npz beside the tiny models: what transformers' greedy generate samples, and how close it was.

    python tests/golden/make_generations.py          (needs the `parity` extra; the tests need no torch)

200 prompts of random tokens over the three families, 24 new tokens each; those of one length are one batch. `gaps` are
the distances between the two best logits of every step: where one is tiny, another order of summation may choose the
other token.
"""

import pathlib

import numpy as np
import torch
import transformers

NUM_PROMPTS = {"qwen3_tied": 67, "qwen2": 67, "llama3": 66}
NUM_NEW_TOKENS, LENGTHS = 24, (2, 11, 23, 40)


def main():
    folder = pathlib.Path(__file__).parent
    for name, num_prompts in NUM_PROMPTS.items():
        model = transformers.AutoModelForCausalLM.from_pretrained(folder / name, dtype=torch.float32).eval()
        rng = np.random.default_rng(0)
        lengths = np.sort(np.resize(LENGTHS, num_prompts))
        prompts = np.zeros((num_prompts, max(LENGTHS)), np.int32)
        tokens = np.zeros((num_prompts, NUM_NEW_TOKENS), np.int32)
        gaps = np.zeros((num_prompts, NUM_NEW_TOKENS), np.float32)
        for length in LENGTHS:
            rows = np.flatnonzero(lengths == length)
            prompts[rows, :length] = rng.integers(0, model.config.vocab_size, (len(rows), length))
            batch = torch.from_numpy(prompts[rows, :length]).long()
            with torch.no_grad():
                made = model.generate(
                    batch, attention_mask=torch.ones_like(batch), do_sample=False, max_new_tokens=NUM_NEW_TOKENS,
                    min_new_tokens=NUM_NEW_TOKENS, eos_token_id=None, pad_token_id=0, output_logits=True,
                    return_dict_in_generate=True,
                )  # fmt: skip
            tokens[rows] = made.sequences[:, length:].numpy()
            best = torch.stack(made.logits, dim=1).topk(2, dim=-1).values
            gaps[rows] = (best[..., 0] - best[..., 1]).numpy()
        path = folder / name / "generations.npz"
        np.savez_compressed(path, prompts=prompts, lengths=lengths, tokens=tokens, gaps=gaps)
        print(path, path.stat().st_size, "bytes; steps closer than 1e-4:", int((gaps < 1e-4).sum()))


if __name__ == "__main__":
    main()
