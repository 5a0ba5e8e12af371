"""The tools and experts of a run, built from its config: what is simulated, what is asked outside, what is recorded.

All that spends real money shares one account; all that is asked outside goes through one store, if there is one.
"""

from __future__ import annotations

import contextlib
import json
import pathlib
from collections.abc import Callable, Sequence

from orchestra_jax.config import RunConfig
from orchestra_jax.data.records import Document
from orchestra_jax.experts.delegation import Answer, EnhanceReasoning, Search, SearchIndex
from orchestra_jax.experts.endpoint import EndpointExpert, load_endpoints
from orchestra_jax.experts.expert import Expert
from orchestra_jax.experts.judge import Judge
from orchestra_jax.experts.replay import RecordedExpert
from orchestra_jax.experts.simulated import SimulatedExperts
from orchestra_jax.experts.world import model_names
from orchestra_jax.tools.budget import Account
from orchestra_jax.tools.faults import FaultyTool
from orchestra_jax.tools.ledger import JUDGE
from orchestra_jax.tools.limits import Limits
from orchestra_jax.tools.mcp import load_servers, read_entries
from orchestra_jax.tools.recording import RecordedTool, Store, recorded_listing
from orchestra_jax.tools.sandbox.python_sandbox import PythonSandbox
from orchestra_jax.tools.search.document_index import DocumentIndex
from orchestra_jax.tools.search.embedding import EmbeddingEndpoint, recorded
from orchestra_jax.tools.search.local_search import LocalSearch
from orchestra_jax.tools.search.web_search import PROVIDERS, WebSearch
from orchestra_jax.tools.tool import Tool
from orchestra_jax.tools.toolbox import Toolbox


def open_store(config: RunConfig) -> Store | None:
    """Where outside calls are recorded or replayed from; None if they are not."""
    tools = config.tools
    return Store(tools.recording_directory, tools.recording_mode) if tools.recording_directory else None


def build_experts(config: RunConfig, account: Account, store: Store | None = None) -> Callable[[str], Expert]:
    """The expert that stands behind each model of the world."""
    simulated = SimulatedExperts(config.world)
    endpoints = _load_endpoints(config, account, store)
    for model, endpoint in endpoints.items():
        if model != JUDGE and endpoint.timeout_s > config.episode.tool_timeout_s and not config.tools.limits_path:
            raise ValueError(
                f"a reply of {model!r} may take {endpoint.timeout_s:g} s and episode.tool_timeout_s "
                f"{config.episode.tool_timeout_s:g} would cut it: raise that, or lower the endpoint's timeout_s"
            )
    experts: dict[str, Expert] = dict(endpoints)
    if store is not None:
        experts = {model: RecordedExpert(endpoint, store) for model, endpoint in endpoints.items()}
    return lambda model: experts.get(model, simulated)


def build_judge(config: RunConfig, account: Account) -> Judge | None:
    """The judge of the outcomes, None where they are computed; ValueError if the endpoints file names none."""
    if config.experts.outcome != "judged":
        return None
    store = open_store(config)
    endpoints = _load_endpoints(config, account, store)
    if JUDGE not in endpoints:
        path = config.experts.endpoints_path
        raise ValueError(f'experts.outcome "judged" wants an entry {JUDGE!r} in experts.endpoints_path {path!r}')
    return Judge(RecordedExpert(endpoints[JUDGE], store) if store is not None else endpoints[JUDGE])


def _load_endpoints(config: RunConfig, account: Account, store: Store | None) -> dict[str, EndpointExpert]:
    if not config.experts.endpoints_path:
        return {}
    models = (*model_names(config.world), JUDGE)
    return load_endpoints(
        config.experts.endpoints_path, models, account, is_offline=store is not None and store.is_replay
    )


def build_index(
    config: RunConfig, documents: Sequence[Document], account: Account, store: Store | None = None
) -> SearchIndex:
    """What the tool `search` looks into. ValueError for an endpoint that costs money under a cap of 0."""
    tools = config.tools
    if not tools.index_directory:
        return LocalSearch(documents)
    embed, price = None, tools.embedding_usd_per_million_tokens
    if tools.embedding_endpoint:
        is_offline = store is not None and store.is_replay
        if price and not config.experts.spend_cap_usd and not is_offline:
            raise ValueError(
                f"embeddings cost ${price:g} a million tokens and experts.spend_cap_usd is 0: set it to the dollars "
                "that the run may spend"
            )
        endpoint = EmbeddingEndpoint(
            tools.embedding_endpoint,
            tools.embedding_model,
            "" if is_offline else tools.embedding_key_variable,
            usd_per_million_tokens=price,
            account=account,
        )
        embed = endpoint.embed if store is None else recorded(endpoint.embed, endpoint.model, store)
    return DocumentIndex(tools.index_directory, tools.ranking, embed, price, tools.num_probes)


def build_toolbox(
    config: RunConfig,
    documents: Sequence[Document],
    sandbox: PythonSandbox,
    account: Account,
    resources: contextlib.ExitStack,
) -> Toolbox:
    """The three delegating tools, then those that the config adds. What has to be closed goes to `resources`.

    ValueError for an unknown provider, limits of no tool, and what the parts refuse.
    """
    store = open_store(config)
    experts = build_experts(config, account, store)
    tools: list[Tool] = [
        Search(experts, build_index(config, documents, account, store), store),
        EnhanceReasoning(experts, sandbox, store),
        Answer(experts),
    ]
    outside = _outside_tools(config, account, resources, store)
    if store is not None:
        outside = [RecordedTool(tool, store, is_stateful=tool.name != WebSearch.name) for tool in outside]
    tools += outside
    if config.faults.is_on:
        tools = [FaultyTool(tool, config.faults) for tool in tools]
    limits = load_limits(config.tools.limits_path) if config.tools.limits_path else {}
    return Toolbox(tools, config.episode.tool_timeout_s, limits)


def _outside_tools(
    config: RunConfig, account: Account, resources: contextlib.ExitStack, store: Store | None
) -> list[Tool]:
    tools: list[Tool] = []
    is_offline = store is not None and store.is_replay  # nobody is asked: no key, no server, no money
    if config.tools.web_provider:
        if config.tools.web_provider not in PROVIDERS:
            raise ValueError(f"tools.web_provider {config.tools.web_provider!r} is not one of {sorted(PROVIDERS)}")
        provider = PROVIDERS[config.tools.web_provider]
        if not config.experts.spend_cap_usd and not is_offline:
            raise ValueError(
                f"web search costs ${provider.cost_usd_per_call:g} a call and experts.spend_cap_usd is 0: set it to "
                "the dollars that the run may spend"
            )
        tools.append(WebSearch(provider, account, is_offline=is_offline))
    if config.tools.mcp_path:

        def start() -> list[Tool]:
            servers = load_servers(config.tools.mcp_path, account)
            for server in servers:
                resources.callback(server.close)
            return [tool for server in servers for tool in server.tools]

        request = {"mcp_servers": read_entries(config.tools.mcp_path)}
        tools += start() if store is None else recorded_listing(request, store, start)
    return tools


def load_limits(path: str) -> dict[str, Limits]:
    """Limits by tool from a JSON file, such as {"web_search": {"timeout_s": 30, "max_concurrent": 4}}.

    ValueError for a file that cannot be read, and a limit that is missing, unknown or impossible.
    """
    try:
        entries = json.loads(pathlib.Path(path).read_text(encoding="utf-8"))
        return {name: Limits(**arguments) for name, arguments in entries.items()}
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"the limits file {path} is not understood: {error}") from error


def load_descriptions(path: str) -> dict[str, str]:
    """Descriptions by model from the file that experiments/describe_experts.py writes; ValueError for another one."""
    try:
        held = json.loads(pathlib.Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"the descriptions file {path} cannot be read: {error}") from error
    if not isinstance(held, dict) or not all(isinstance(text, str) for text in held.values()):
        raise ValueError(f"the descriptions file {path} holds no JSON object of texts by model")
    return held
