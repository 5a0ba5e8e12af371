"""A sentence encoder behind /v1/embeddings, asked through the client that local search uses. Needs the `parity` extra.

pytest -m parity
"""

import threading

import numpy as np
import pytest

from experiments.serve_embeddings import load_encoder, make_server
from orchestra_jax.tools.search.embedding import EmbeddingEndpoint

WORDS = ("[PAD]", "[UNK]", "cats", "purr", "dogs", "bark", "loud")


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """A random BERT of one layer over seven words."""
    torch = pytest.importorskip("torch", reason="needs the parity extra")
    from safetensors.torch import save_file
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import BertConfig, BertModel

    folder = tmp_path_factory.mktemp("encoder")
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(WORDS), hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
        max_position_embeddings=16,
    )  # fmt: skip
    config.save_pretrained(folder)
    save_file(BertModel(config).state_dict(), folder / "weights.safetensors")
    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(WORDS)}, "[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


@pytest.mark.parity
def test_the_endpoint_gives_the_mean_of_the_last_layer_whatever_stands_beside_a_text(directory):
    import torch
    from safetensors.torch import load_file
    from transformers import BertConfig, BertModel

    server = make_server(load_encoder(directory, max_tokens=3), 0)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        endpoint = EmbeddingEndpoint(f"http://127.0.0.1:{server.server_port}/v1", "m", batch_size=2)
        texts = ["cats", "dogs bark loud", "dogs bark loud purr purr"]  # the last one is cut behind three words
        vectors_ND = endpoint.embed(texts)
    finally:
        server.shutdown()
        server.server_close()
    model = BertModel(BertConfig.from_pretrained(directory)).eval()
    model.load_state_dict(load_file(directory / "weights.safetensors"))
    with torch.inference_mode():
        means = [model(torch.tensor([ids])).last_hidden_state[0].mean(0).numpy() for ids in ([2], [4, 5, 6])]
    expected_ND = np.stack([mean / np.linalg.norm(mean) for mean in (*means, means[1])])
    np.testing.assert_allclose(vectors_ND, expected_ND, atol=1e-5)
    assert abs(vectors_ND[0] @ vectors_ND[1]) < 0.999  # else equal vectors would pass


@pytest.mark.parity
def test_a_directory_of_two_weight_files_is_refused(directory, tmp_path):
    for name in ("a.safetensors", "b.safetensors"):
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(ValueError, match="must hold one safetensors file, got"):
        load_encoder(tmp_path, 8)
