"""Writes generations.npz beside the tiny models: what transformers' greedy generate samples, and how close it was.

    python tests/golden/make_generations.py          (needs the `parity` extra; the tests need no torch)

200 prompts of 1 to 40 random tokens over the three families, 24 new tokens each. `gaps` are the distances between the
two best logits of every step: where one is tiny, another order of summation may choose the other token.
"""

import pathlib

import numpy as np
import torch
import transformers

NUM_PROMPTS = {"qwen3_tied": 67, "qwen2": 67, "llama3": 66}
NUM_NEW_TOKENS, MAX_PROMPT_TOKENS = 24, 40


def main():
    folder = pathlib.Path(__file__).parent
    for name, num_prompts in NUM_PROMPTS.items():
        model = transformers.AutoModelForCausalLM.from_pretrained(folder / name, dtype=torch.float32).eval()
        rng = np.random.default_rng(0)
        lengths = rng.integers(1, MAX_PROMPT_TOKENS + 1, num_prompts)
        prompts = np.zeros((num_prompts, MAX_PROMPT_TOKENS), np.int32)
        tokens = np.zeros((num_prompts, NUM_NEW_TOKENS), np.int32)
        gaps = np.zeros((num_prompts, NUM_NEW_TOKENS), np.float32)
        for number, length in enumerate(lengths):
            prompts[number, :length] = rng.integers(0, model.config.vocab_size, length)
            prompt = torch.from_numpy(prompts[number : number + 1, :length]).long()
            with torch.no_grad():
                made = model.generate(
                    prompt, attention_mask=torch.ones_like(prompt), do_sample=False, max_new_tokens=NUM_NEW_TOKENS,
                    min_new_tokens=NUM_NEW_TOKENS, eos_token_id=None, pad_token_id=0, output_logits=True,
                    return_dict_in_generate=True,
                )  # fmt: skip
            tokens[number] = made.sequences[0, length:].numpy()
            best = torch.stack(made.logits)[:, 0].topk(2, dim=-1).values
            gaps[number] = (best[:, 0] - best[:, 1]).numpy()
        path = folder / name / "generations.npz"
        np.savez_compressed(path, prompts=prompts, lengths=lengths, tokens=tokens, gaps=gaps)
        print(path, path.stat().st_size, "bytes; steps closer than 1e-4:", int((gaps < 1e-4).sum()))


if __name__ == "__main__":
    main()
