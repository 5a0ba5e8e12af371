"""Turns a GGUF file into a Hugging Face directory that `load_pretrained`, transformers and SGLang read.

pip install -e '.[gguf]'
python -m experiments.import_gguf --gguf=MODEL.gguf --directory=models/my_model
"""

import sys

from absl import app, flags

_GGUF = flags.DEFINE_string("gguf", None, "The file to read.")
_DIRECTORY = flags.DEFINE_string("directory", None, "The directory to write: new, or without weights.")


def main(_):
    from orchestra_jax.models.gguf_file import convert

    try:
        convert(_GGUF.value, _DIRECTORY.value)
    except ValueError as error:
        print(f"import_gguf: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    flags.mark_flags_as_required(["gguf", "directory"])
    app.run(main)
