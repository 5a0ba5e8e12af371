"""The configuration of a run: plain dataclasses, made by `get_config()` in configs/, overridden by field with flags.

What is wrong with one is said by components.check_config.
"""

from __future__ import annotations

import dataclasses
import math

from orchestra_jax.chat import SMALL_TOKENIZER_DIRECTORY
from orchestra_jax.experts.world import WorldConfig
from orchestra_jax.generation.jax_engine import JaxEngineConfig
from orchestra_jax.generation.sglang.processes import ServingConfig
from orchestra_jax.generation.sglang_engine import SGLangConfig
from orchestra_jax.models.lora import LoraConfig
from orchestra_jax.optimizers import OptimizerConfig
from orchestra_jax.tools.faults import FaultsConfig


@dataclasses.dataclass
class DataConfig:
    num_tasks_per_cell: int = 300  # training tasks of each family and kind
    num_test_tasks_per_cell: int = 60
    corpus_path: str = ""  # a JSONL file or a folder of text; empty: built from the tables
    weights: tuple[float, ...] = ()  # outcome, cost_usd, latency_s of one preference in the place of the five
    seed: int = 0


@dataclasses.dataclass
class PromptConfig:
    """How prompts are written: see chat.RENDERINGS. Any tokenizer directory of the Qwen3 family serves."""

    tokenizer_directory: str = str(SMALL_TOKENIZER_DIRECTORY)
    rendering: str = "compact"


@dataclasses.dataclass
class ExpertsConfig:
    """Who stands behind the aliases: the simulated world, but for the models that a file gives an endpoint."""

    endpoints_path: str = ""  # JSON, see experts.endpoint.load_endpoints; empty: all are simulated
    outcome: str = "computed"  # "judged": by the model under "judge" in that file, where no exact match decides
    spend_cap_usd: float = 0.0  # of real money, over the whole run: endpoints that cost money want one
    descriptions_path: str = ""  # JSON by model, see experiments/describe_experts.py; shown with the whole template


@dataclasses.dataclass
class ToolsConfig:
    isolation: str = (
        "strongest"  # of the Python sandbox, see tools.sandbox.isolation; a level that is named is required
    )
    index_directory: str = ""  # of experiments/build_index.py; empty: BM25 in memory over the corpus
    ranking: str = "bm25"  # of that index: "bm25", "dense" or "fused"
    num_probes: int = 128  # lists of a large index of vectors that a query looks at
    embedding_endpoint: str = ""  # for the queries of the last two
    embedding_model: str = ""
    embedding_key_variable: str = ""
    embedding_usd_per_million_tokens: float = 0.0  # of real money; 0: nobody is billed
    web_provider: str = ""  # a key of tools.search.web_search.PROVIDERS: adds the tool web_search
    mcp_path: str = ""  # JSON, see tools.mcp.load_servers: adds their tools
    limits_path: str = ""  # JSON by tool, see tools.limits.Limits
    recording_directory: str = ""  # outside calls are recorded there; empty: they are not
    recording_mode: str = "record"  # or "replay": nobody is asked


@dataclasses.dataclass
class ComputeConfig:
    """How the forward pass is computed, where it is not as the model's own config has it."""

    dtype: str = "own"  # of the matrix products
    remat: str = "own"  # a key of transformer.REMAT_POLICIES, or "none"
    attention: str = "own"  # a key of attention.IMPLEMENTATIONS, or "auto"
    num_threads: int = 2  # micro-batches (grpo/accumulation.py) and embedded engines at a time; on a mesh there is one


@dataclasses.dataclass
class FunctionsConfig:
    """The tasks of environment "functions": see function_world."""

    domain: str = "library"  # a key of function_world.DOMAINS, or a folder that experiments/synthesize.py wrote
    num_databases: int = 8  # for training, and as many others for held-out tasks
    num_people: int = 60  # members or customers of a database
    num_things: int = 150  # books or parcels
    num_places: int = 4  # branches or depots
    difficulties: tuple[int, ...] = (1, 2, 3, 4, 5, 6)  # golden calls, in turn
    has_short_wishes: bool = False  # lines of one verb and numbers, for a policy with a small vocabulary
    num_tasks: int = 2000
    num_test_tasks: int = 300
    # Files of tasks, one a line in JSON (environments.functions.task), in the place of generated or synthesised ones.
    task_paths: tuple[str, ...] = ()
    task_weights: tuple[float, ...] = ()  # of each file in the mixture; empty: by its number of tasks
    test_task_path: str = ""
    demonstrations: str = "golden"  # of the warm start, a key of function_world.DEMONSTRATIONS
    num_spare_calls: int = 2  # beside the golden ones and the one that tells the user
    call_cost_usd: float = 0.001  # of a function
    call_latency_s: float = 1.0
    has_experts: bool = False  # call_expert beside the functions
    adviser_skill: float = 0.8  # of simulated experts: how often they name the right call
    preferences: tuple[str, ...] = ("outcome", "cheap", "fast")  # of data.preferences
    user_endpoint: str = ""  # the base URL of a model that plays the user; empty: by script
    user_model: str = ""
    user_key_variable: str = ""
    user_usd_per_million_tokens: tuple[float, ...] = ()  # input and output, of real money; wanted with a key


@dataclasses.dataclass
class Tau2Config:
    """tau2-bench's tasks of environment "tau2": see tau2_world. Prices of calls, preferences and the user are those of
    `functions`."""

    domain: str = "retail"  # or "airline", "telecom"
    server_python: str = ""  # an interpreter that has the domain's code; empty: this one
    checkout: str = ""  # of tau2-bench; empty: the package inspect-evals
    takes_any_version: bool = False  # data other than the pinned, too


@dataclasses.dataclass
class EpisodeConfig:
    max_turn_tokens: int = 32
    max_tokens: int = 192  # prompt and all turns
    calls_per_turn: int = 1
    temperature: float = 1.0
    tool_timeout_s: float = 150.0  # the last word: above the deadlines of endpoints (120), servers and web search
    ends_on_tool_failure: bool = True  # else the policy is shown the failure and goes on
    num_corrections: int = 1  # malformed turns that are answered with what is wrong; the next one ends the episode


@dataclasses.dataclass
class WarmStartConfig:
    """Supervised steps on demonstrations with a random route."""

    num_steps: int = 500
    num_groups: int = 16
    group_size: int = 4
    groups_per_micro_batch: int = 4
    optimizer: OptimizerConfig = dataclasses.field(default_factory=lambda: OptimizerConfig(learning_rate=5e-3))


@dataclasses.dataclass
class GrpoConfig:
    num_steps: int = 400
    num_groups: int = 64  # instances a step
    group_size: int = 4  # rollouts of each
    rollout_lag: int = 0  # 1: the next step's rollouts are played beside the update, by the weights before (sampler.py)
    groups_per_update: int = 16  # an optimizer step for each so many groups of a step, on those of them that are kept
    groups_per_micro_batch: int = 4  # gradients are summed over micro-batches of this size
    # Padded lengths: of what a group's rollouts share, its last token not counted, and of the rest of each.
    prefix_buckets: tuple[int, ...] = (64, 112)
    completion_buckets: tuple[int, ...] = (22, 46, 100)  # one for episode.max_tokens is added
    num_shared: int = 24  # tokens behind the prompt that run once with it where all rollouts have them, at most
    batching: str = "shared_prompt"  # "packed": whole trajectories in rows of tokens_per_row (grpo/packing.py)
    tokens_per_row: int = 768
    rows_per_micro_batch: int = 4
    segments_per_row: int = 16
    num_updates: int = 1  # optimizer steps on the same groups
    # The reward: rewards/preference.py, normalization.py, constraints.py.
    reward_form: str = "gated_sum"
    range_rule: str = "reference"  # "group" is the paper's
    range_floor_cost_usd: float = 0.0  # of "group" and "correct"; 0 is the paper's
    range_floor_latency_s: float = 0.0
    budget_cost_usd: float = math.inf  # of "constrained", on the mean over rollouts
    budget_latency_s: float = math.inf
    multiplier_rate: float = 0.05
    # The advantage: grpo/advantages.py.
    advantage: str = "grpo"
    std_ddof: int = 1
    std_epsilon: float = 1e-6
    std_floor: float = 0.0
    advantage_clip: float = 3.0
    # The filters: grpo/filters.py.
    filters: str = "negatives_stay"  # "paper" drops malformed and unanswered rollouts from the loss
    min_group_std: float = 0.1
    max_resamples: int = 0  # rounds in which homogeneous groups are replaced (collection.py)
    overlong: str = "keep"  # "mask" or "soft"
    overlong_buffer_tokens: int = 32
    max_policy_lag: int = 4  # versions
    # Nats, mean over tokens of a step's first update; a larger one stops the run. With a rollout lag only the first
    # step is looked at, where both sides have the same weights.
    max_sampler_gap: float = 0.05
    # The loss: grpo/loss.py.
    ratio: str = "token"
    correction: str = "token"
    clip_low: float = 0.2
    clip_high: float = 0.28
    dual_clip: float = 10.0
    correction_clip: float = 2.0
    kl: str = "k2"  # "k3", or "k1_reward": no term of the loss (grpo/kl_penalty.py)
    kl_coefficient: float = 0.2  # to the warm start; falls linearly to the final one
    final_kl_coefficient: float = 0.1
    entropy_coefficient: float = 0.0
    aggregation: str = "token_mean"
    logprob_chunk: int = 256  # tokens whose logits exist at a time; on a CPU 512 where models/token_loss.py serves
    optimizer: OptimizerConfig = dataclasses.field(
        default_factory=lambda: OptimizerConfig(learning_rate=6e-4, falling_share=0.7)
    )


@dataclasses.dataclass
class MeshConfig:
    """Over how many devices updates and the embedded engine are spread, by axis of the mesh (sharding.RULES)."""

    data: int = 1
    fsdp: int = 1
    tensor: int = 1
    context: int = 1


@dataclasses.dataclass
class EvaluationConfig:
    num_per_preference: int = 300
    num_clairvoyant_draws: int = 16
    seed: int = 1_000_000


@dataclasses.dataclass
class RunConfig:
    seed: int = 0
    # A key of models.config.MODELS, with fresh weights; or a Hugging Face directory or GGUF file, whose weights are
    # trained: prompt.tokenizer_directory is the tokenizer that belongs to them.
    model: str = "quickstart"
    engine: str = "jax"  # or "sglang": servers that stand outside (experiments/serve_policy.py)
    environment: str = "question_answering"  # a key of worlds.WORLDS
    checkpoint_every: int = 50  # GRPO steps
    keep_checkpoints: int = 2
    num_saved_groups: int = 4  # of each saved step, in trajectories/
    world: WorldConfig = dataclasses.field(default_factory=WorldConfig)
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    functions: FunctionsConfig = dataclasses.field(default_factory=FunctionsConfig)
    tau2: Tau2Config = dataclasses.field(default_factory=Tau2Config)
    prompt: PromptConfig = dataclasses.field(default_factory=PromptConfig)
    experts: ExpertsConfig = dataclasses.field(default_factory=ExpertsConfig)
    tools: ToolsConfig = dataclasses.field(default_factory=ToolsConfig)
    faults: FaultsConfig = dataclasses.field(default_factory=FaultsConfig)
    episode: EpisodeConfig = dataclasses.field(default_factory=EpisodeConfig)
    jax_engine: JaxEngineConfig = dataclasses.field(default_factory=JaxEngineConfig)
    sglang: SGLangConfig = dataclasses.field(default_factory=SGLangConfig)
    serving: ServingConfig = dataclasses.field(default_factory=ServingConfig)
    compute: ComputeConfig = dataclasses.field(default_factory=ComputeConfig)
    lora: LoraConfig = dataclasses.field(default_factory=LoraConfig)
    warm_start: WarmStartConfig = dataclasses.field(default_factory=WarmStartConfig)
    grpo: GrpoConfig = dataclasses.field(default_factory=GrpoConfig)
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)
    evaluation: EvaluationConfig = dataclasses.field(default_factory=EvaluationConfig)
