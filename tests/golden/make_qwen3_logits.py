"""Writes qwen3_tied.npz and qwen3_untied.npz: a tiny random Qwen3 of Hugging Face, an input and its logits.

    python tests/golden/make_qwen3_logits.py          (needs torch and transformers; the tests need neither)

The weights keep their Hugging Face names. The second row is padded on the right after 5 tokens.
"""

import pathlib

import numpy as np
import torch
import transformers

SHAPE = {
    "vocab_size": 37,
    "hidden_size": 20,
    "intermediate_size": 28,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 6,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 128,
}
ROPE_THETA = 10_000.0


def main():
    for name, is_tied in (("qwen3_tied", True), ("qwen3_untied", False)):
        torch.manual_seed(0)
        config = transformers.Qwen3Config(
            **SHAPE,
            rope_parameters={"rope_type": "default", "rope_theta": ROPE_THETA},
            tie_word_embeddings=is_tied,
            attn_implementation="eager",
        )
        model = transformers.Qwen3ForCausalLM(config).eval().float()
        with torch.no_grad():
            for weight in model.parameters():  # large enough that every part of the model shows in the logits
                weight.normal_(1.0 if weight.ndim == 1 else 0.0, 0.3)
            tokens = torch.randint(0, SHAPE["vocab_size"], (2, 11))
            attention_mask = torch.ones_like(tokens)
            attention_mask[1, 5:] = 0
            logits = model(input_ids=tokens, attention_mask=attention_mask).logits
        weights = {key: value.numpy() for key, value in model.state_dict().items()}
        if is_tied:
            del weights["lm_head.weight"]
        path = pathlib.Path(__file__).parent / f"{name}.npz"
        np.savez_compressed(
            path, tokens=tokens.numpy(), attention_mask=attention_mask.numpy(), logits=logits.numpy(), **weights
        )
        print(path, path.stat().st_size, "bytes")


if __name__ == "__main__":
    main()
