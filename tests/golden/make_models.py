"""Writes one directory a model: a tiny random model of Hugging Face as it saves it, with inputs and logits beside it.

    python tests/golden/make_models.py          (needs the `parity` extra; the tests need no torch)

The second row of the input is padded on the right after 5 tokens. The shapes are awkward on purpose: head_dim is not
hidden / heads where the family allows it, every ratio of query heads to key heads (1, 2, 8) is there, and the scaled
models read positions far beyond their original context.
"""

import pathlib

import numpy as np
import torch
import transformers

QWEN3, QWEN2, LLAMA = (
    (getattr(transformers, f"{name}Config"), getattr(transformers, f"{name}ForCausalLM"))
    for name in ("Qwen3", "Qwen2", "Llama")
)
SHAPE = {"vocab_size": 38, "intermediate_size": 28, "num_hidden_layers": 2, "max_position_embeddings": 128}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 16, "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
}  # fmt: skip


def default(theta):
    return {"rope_type": "default", "rope_theta": theta}


# name -> (family, is_tied, hidden size, query heads, key heads, head_dim or None, rope)
MODELS = {
    "qwen3_tied": (QWEN3, True, 20, 4, 2, 6, default(1e4)),
    "qwen3_untied": (QWEN3, False, 20, 4, 2, 6, default(5e6)),
    "qwen3_yarn": (QWEN3, False, 24, 8, 1, 10, {**YARN, "rope_theta": 1e4}),
    "qwen2": (QWEN2, True, 24, 3, 3, None, default(1e6)),
    "llama3": (LLAMA, False, 32, 4, 2, None, {**LLAMA3, "rope_theta": 5e5}),
    "llama3_wide": (LLAMA, True, 24, 8, 1, 10, {**LLAMA3, "rope_theta": 5e5}),
}


def main():
    for name, ((config_class, model_class), is_tied, hidden, heads, kv_heads, head_dim, rope) in MODELS.items():
        torch.manual_seed(0)
        config = config_class(
            **SHAPE,
            hidden_size=hidden,
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            **({"head_dim": head_dim} if head_dim else {}),
            rope_parameters=rope,
            tie_word_embeddings=is_tied,
            attn_implementation="eager",
        )
        model = model_class(config).eval().float()
        with torch.no_grad():
            for weight in model.parameters():  # large enough that every part of the model shows in the logits
                weight.normal_(1.0 if weight.ndim == 1 else 0.0, 0.3)
            tokens = torch.randint(0, SHAPE["vocab_size"], (2, 90))
            attention_mask = torch.ones_like(tokens)
            attention_mask[1, 5:] = 0
            logits = model(input_ids=tokens, attention_mask=attention_mask).logits
        path = pathlib.Path(__file__).parent / name
        model.save_pretrained(path)
        (path / "generation_config.json").unlink(missing_ok=True)
        arrays = {"tokens": tokens, "attention_mask": attention_mask, "logits": logits}
        np.savez_compressed(path / "logits.npz", **{key: value.numpy() for key, value in arrays.items()})
        print(path.name, sum(file.stat().st_size for file in path.iterdir()), "bytes")


if __name__ == "__main__":
    main()
