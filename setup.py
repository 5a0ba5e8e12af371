"""Packaging of orchestra_jax: the library alone. Configs, experiments, notebooks and tests stay in the repository."""

from setuptools import find_packages, setup

INSTALL_REQUIRES = [
    "jax>=0.10,<0.12",  # 0.11 needs Python 3.12; on 3.11 pip takes 0.10
    "flax>=0.12",
    "optax>=0.2.6",
    "orbax-checkpoint>=0.12",
    "transformers>=5.0",  # brings tokenizers, huggingface_hub and safetensors
    "jinja2>=3.1",  # chat templates; transformers does not pull it in
    "grain>=0.2.15",
    "tensorboard>=2.20",
    "absl-py>=2.2",
    "ml_collections>=1.1",
    "numpy>=2.0",
    "reasoning-gym>=0.1.25",
    "countryinfo>=1.0",
    "mendeleev==0.6.1",  # later ones pin pyfiglet away from reasoning-gym's pin; only its SQLite table is read
    "bm25s>=0.3",
    "jsonschema>=4.20",
    "pydantic>=2.7",
    "openai>=2.8",
    "httpx2>=2.0",  # what openai speaks HTTP with; web search does too
    "aiohttp>=3.10",  # what SGLang servers are asked with
    "tqdm>=4.66",
    "matplotlib>=3.9",
]

NOTEBOOKS = ["nbclient>=0.10", "nbformat>=5.10", "ipykernel>=6.29", "pandas>=2.2"]
GGUF = ["gguf>=0.17"]
TOOLS = ["mcp>=2.0", "faiss-cpu>=1.10", "pyseccomp>=0.1.2"]
DATA = ["pyarrow>=18"]  # Parquet files
CONSTRAINTS = ["llguidance>=1.3"]  # tool calls held to their schemas while they are sampled

EXTRAS_REQUIRE = {
    "test": [
        "pytest>=8.0",
        "pytest-xdist>=3.6",
        "hypothesis>=6.100",
        "ruff>=0.12",
        *NOTEBOOKS,
        *GGUF,
        *TOOLS,
        *CONSTRAINTS,
        *DATA,
    ],
    "notebooks": NOTEBOOKS,
    "tools": TOOLS,
    "parity": ["torch==2.13.0"],  # makes the golden files that the default tests read
    "gguf": GGUF,
    "tau2": ["inspect-evals==0.26.0"],  # data and tools of tau2-bench; an environment of its own serves as well
    "constraints": CONSTRAINTS,
    "data": DATA,
    "cuda": ["jax[cuda12]"],
    "cuda13": ["jax[cuda13]"],
    "tpu": ["jax[tpu]"],
}

setup(
    name="orchestra_jax",
    version="0.1.0",
    description="A JAX implementation of ToolOrchestra: a small policy trained to orchestrate tools and larger models",
    license="Apache-2.0",
    python_requires=">=3.11",
    classifiers=[f"Programming Language :: Python :: 3.{minor}" for minor in (11, 12, 13)],
    packages=find_packages(include=["orchestra_jax", "orchestra_jax.*"]),
    package_data={"orchestra_jax": ["assets/**"]},
    install_requires=INSTALL_REQUIRES,
    extras_require=EXTRAS_REQUIRE,
)
