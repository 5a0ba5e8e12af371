"""The models of ToolOrchestra by role, with published prices and latencies, and the pools that are drawn from them.

    from configs.catalog import EVALUATION, TRAINING, UNSEEN_MODELS, UNSEEN_PRICES
    from orchestra_jax.data.instances import make_instance
    instance = make_instance(task, preference, world, seed, pool=TRAINING)

Source: arXiv 2511.21689, sections 3.3 and 4.1, appendices D and E, and the release's tables. Prices are US dollars per
million tokens, latencies seconds of an average call. What is published stands in PUBLISHED. The paper names further
models of its training pool and of its unseen pool without a latency, and the providers of its price schedules without
their prices: ASSUMED holds what we take for the former (by size and vendor, not measured), and a schedule here is a
factor on the published price, drawn per model and instance.
"""

from orchestra_jax.experts.catalog import Listing, Pool

# model: (input price, output price, are its weights open, seconds by role)
PUBLISHED = {
    "gpt-5": (1.25, 10.0, False, {"search": 22.0, "enhance_reasoning": 31.0, "answer": 96.0}),
    "gpt-5-mini": (0.25, 2.0, False, {"search": 16.0, "enhance_reasoning": 25.0, "answer": 27.0}),
    "Qwen3-32B": (0.8, 0.8, True, {"search": 8.0, "answer": 11.0}),
    "Qwen2.5-Coder-32B-Instruct": (0.8, 0.8, True, {"enhance_reasoning": 9.0}),
    "Llama-3.3-70B-Instruct": (0.9, 0.9, True, {"answer": 15.0}),
    "Qwen2.5-Math-72B-Instruct": (0.9, 0.9, True, {"answer": 13.0}),
    "Qwen2.5-Math-7B-Instruct": (0.2, 0.2, True, {"answer": 9.0}),
}
# Prices of o3-mini, the Claude models and Nemotron-Ultra are published, the other numbers are assumptions.
ASSUMED = {
    "Llama-3.3-70B-Instruct": (0.9, 0.9, True, {"search": 10.0}),
    "Llama-3.1-8B-Instruct": (0.2, 0.2, True, {"search": 4.0, "answer": 6.0}),
    "DeepSeek-R1": (3.0, 7.0, True, {"search": 20.0, "answer": 60.0}),
    "Nemotron-Ultra-253B": (0.9, 0.9, True, {"search": 12.0, "answer": 25.0}),
    "Phi-4-mini-instruct": (0.1, 0.1, True, {"search": 3.0, "answer": 5.0}),
    "gemma-3-27b-it": (0.3, 0.3, True, {"search": 8.0, "answer": 12.0}),
    "starcoder2-15b": (0.3, 0.3, True, {"enhance_reasoning": 8.0}),
    "claude-opus-4.1": (15.0, 75.0, False, {"search": 20.0, "enhance_reasoning": 30.0, "answer": 60.0}),
    "claude-sonnet-4.1": (3.0, 15.0, False, {"enhance_reasoning": 20.0, "answer": 40.0}),
    "o3-mini": (1.1, 4.4, False, {"search": 15.0}),
    "gpt-4o": (2.5, 10.0, False, {"search": 6.0}),
    "Codestral-22B": (0.3, 0.9, True, {"enhance_reasoning": 9.0}),
    "OpenMath-Llama-2-70b": (0.9, 0.9, True, {"answer": 13.0}),
    "deepseek-math-7b": (0.2, 0.2, True, {"answer": 9.0}),
}


def list_models(role: str, stem: str, *models: str) -> tuple[Listing, ...]:
    """Listings of `models` in a role, under the aliases stem-1, stem-2, ..."""
    listings = []
    for number, model in enumerate(models, start=1):
        is_published = role in PUBLISHED.get(model, ((), (), (), {}))[3]
        input_usd, output_usd, is_local, latency_s = (PUBLISHED if is_published else ASSUMED)[model]
        listings.append(
            Listing(role, f"{stem}-{number}", model, input_usd, output_usd, latency_s[role], is_local, is_published)
        )
    return tuple(listings)


EVALUATION = Pool(
    (
        *list_models("search", "search", "gpt-5", "gpt-5-mini", "Qwen3-32B"),
        *list_models("enhance_reasoning", "reasoner", "gpt-5", "gpt-5-mini", "Qwen2.5-Coder-32B-Instruct"),
        *list_models("answer", "answer", "gpt-5", "gpt-5-mini", "Llama-3.3-70B-Instruct", "Qwen3-32B"),
        *list_models("answer", "answer-math", "Qwen2.5-Math-72B-Instruct", "Qwen2.5-Math-7B-Instruct"),
    )
)

_GENERALISTS = (
    "gpt-5", "gpt-5-mini", "Llama-3.3-70B-Instruct", "Llama-3.1-8B-Instruct", "DeepSeek-R1", "Nemotron-Ultra-253B",
    "Phi-4-mini-instruct", "Qwen3-32B",
)  # fmt: skip
_CODE_WRITERS = ("gpt-5", "gpt-5-mini", "starcoder2-15b", "Qwen2.5-Coder-32B-Instruct")

# A random subset, shuffled aliases, prices and latencies for each instance.
TRAINING = Pool(
    (
        *list_models("search", "search", *_GENERALISTS, "gemma-3-27b-it"),
        *list_models("enhance_reasoning", "reasoner", *_CODE_WRITERS),
        *list_models("answer", "answer", *_GENERALISTS),
        *list_models("answer", "answer-math", "Qwen2.5-Math-72B-Instruct", "Qwen2.5-Math-7B-Instruct"),
    ),
    least_offered=2,
    is_shuffled=True,
    price_factors=(0.5, 0.7, 1.0, 1.4, 2.0),
    latency_factors=(0.5, 1.0, 2.0),
)

UNSEEN_MODELS = Pool(
    (
        *list_models("search", "search", "claude-opus-4.1", "o3-mini", "gpt-4o"),
        *list_models("enhance_reasoning", "reasoner", "claude-opus-4.1", "claude-sonnet-4.1", "Codestral-22B"),
        *list_models("answer", "answer", "claude-opus-4.1", "claude-sonnet-4.1", "gemma-3-27b-it"),
        *list_models("answer", "answer-math", "OpenMath-Llama-2-70b", "deepseek-math-7b"),
    )
)

# The evaluation pool at prices that training never draws.
UNSEEN_PRICES = Pool(EVALUATION.listings, price_factors=(0.25, 0.35, 3.0, 4.0))
