"""Tools of any MCP server, over stdio or streamable HTTP, through the MCP SDK.

A server's session lives in a thread with an event loop of its own: it has to outlive the loops of the training steps.
What a tool returns is text; a result that the server marks as an error has failed, and a lost connection too.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import json
import os
import pathlib
import threading
import time
from collections.abc import Mapping, Sequence

from orchestra_jax.tools.budget import Account, Quote
from orchestra_jax.tools.credentials import clean_text, public_url
from orchestra_jax.tools.ledger import make_receipt
from orchestra_jax.tools.tool import ToolContext, ToolResult
from orchestra_jax.types import CallStatus, Reason

START_TIMEOUT_S = 60.0
MAX_SUMMARY_CHARS = 80
MAX_TOOLS = 1_000  # of a server that lists them page by page


class McpServer:
    """A running server and its tools. Close it in the end.

    Args:
      command: the program and its arguments, for a server over stdio; or
      url: the endpoint of a server over streamable HTTP.
      prefix: stands before the names of its tools, where two servers have one of the same name.
      variables: names of environment variables that the program is given besides the harmless ones.
      api_key_variable: the variable whose value goes to a URL as a bearer token.
      timeout_s: of one call. cost_usd: what one call is charged, of real money that `account` counts.

    Raises:
      ValueError: neither or both of command and url, a variable that is not set, a url that can hold a key, or a server
        that does not start.
    """

    def __init__(
        self,
        command: Sequence[str] = (),
        url: str = "",
        prefix: str = "",
        variables: Sequence[str] = (),
        api_key_variable: str = "",
        timeout_s: float = 60.0,
        cost_usd: float = 0.0,
        account: Account | None = None,
    ):
        if bool(command) == bool(url):
            raise ValueError(f"an MCP server has a command or a url, got command {list(command)} and url {url!r}")
        public_url(url)
        wanted = [*variables, *([api_key_variable] if api_key_variable else [])]
        if unset := [name for name in wanted if name not in os.environ]:
            raise ValueError(f"the environment variables {unset} of the MCP server {url or command[0]!r} are not set")
        self._command, self._url, self._variables, self._key_variable = tuple(command), url, variables, api_key_variable
        self._secrets = [os.environ[name] for name in wanted if os.environ[name]]
        self.timeout_s, self.cost_usd, self.account = timeout_s, cost_usd, account or Account()
        if not cost_usd >= 0:
            raise ValueError(f"cost_usd {cost_usd} of the MCP server {url or command[0]!r} must be 0 or more")
        if cost_usd and not self.account.cap_usd:
            raise ValueError(
                f"a call of the MCP server {url or command[0]!r} costs ${cost_usd:g} and experts.spend_cap_usd is 0: "
                "set it to the dollars that the run may spend"
            )
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="mcp", daemon=True)
        self._thread.start()
        ready: concurrent.futures.Future = concurrent.futures.Future()
        self._close_event = asyncio.Event()
        self._session = asyncio.run_coroutine_threadsafe(self._serve(ready), self._loop)
        concurrent.futures.wait(
            [ready, self._session], timeout=START_TIMEOUT_S, return_when=concurrent.futures.FIRST_COMPLETED
        )
        if not ready.done():
            error = self._session.exception() if self._session.done() else f"nothing within {START_TIMEOUT_S:g} s"
            self.close()
            told = self.clean(f"{type(error).__name__}: {error}" if isinstance(error, BaseException) else error)
            raise ValueError(f"the MCP server {url or command[0]!r} does not start: {told}")
        listed = ready.result()
        self.tools = tuple(McpTool(self, prefix, each) for each in listed)

    async def _serve(self, ready: concurrent.futures.Future) -> None:
        """Opens and closes the session in one task, as its cancel scopes want it."""
        import mcp

        async with mcp.Client(self._connection(mcp)) as self._client:
            page = await self._client.list_tools()
            listed = list(page.tools)
            while page.next_cursor and len(listed) < MAX_TOOLS:
                page = await self._client.list_tools(cursor=page.next_cursor)
                listed += page.tools
            ready.set_result(listed)
            await self._close_event.wait()

    def _connection(self, mcp):
        if self._command:
            environment = mcp.client.stdio.get_default_environment()
            environment |= {name: os.environ[name] for name in self._variables}
            return mcp.StdioServerParameters(command=self._command[0], args=list(self._command[1:]), env=environment)
        if not self._key_variable:
            return self._url
        import httpx2
        from mcp.client.streamable_http import streamable_http_client

        headers = {"Authorization": f"Bearer {os.environ[self._key_variable]}"}
        return streamable_http_client(self._url, http_client=httpx2.AsyncClient(headers=headers, timeout=None))

    async def call(self, name: str, arguments: dict[str, object]):
        """The SDK's result, from whatever event loop this is awaited in. RuntimeError when the server is closed."""
        if not self._thread.is_alive():
            raise RuntimeError("the MCP server is closed")
        asked = asyncio.run_coroutine_threadsafe(self._client.call_tool(name, arguments), self._loop)
        return await asyncio.wait_for(asyncio.wrap_future(asked), self.timeout_s)

    def clean(self, text: str) -> str:
        return clean_text(text, *self._secrets)

    def close(self) -> None:
        """Ends the session, the server's process with it, and the thread."""
        if not self._thread.is_alive():
            return
        self._loop.call_soon_threadsafe(self._close_event.set)
        concurrent.futures.wait([self._session], timeout=10)
        self._session.cancel()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(timeout=10)

    def __enter__(self) -> McpServer:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


class McpTool:
    """A `Tool` (tool.py) of a server."""

    def __init__(self, server: McpServer, prefix: str, listed):
        self.name = prefix + listed.name
        self.description = server.clean(listed.description or listed.name)
        self.parameters_schema = dict(listed.input_schema)
        self.cost_usd = server.cost_usd
        self._server, self._own_name = server, listed.name

    def quote(self, arguments: dict[str, object], context: ToolContext) -> Quote:
        return Quote(self._server.cost_usd)

    async def run(self, arguments: dict[str, object], context: ToolContext) -> ToolResult:
        import mcp

        start_s, cost_usd = time.monotonic(), self._server.cost_usd
        status, reason = CallStatus.OK, Reason.NONE
        if not self._server.account.reserve(cost_usd):
            receipt = make_receipt(self.name, service_s=0.0, status=CallStatus.FAILED, reason=Reason.SPEND_CAP)
            return ToolResult(f"{self.name} failed: {Reason.SPEND_CAP}", "failed", receipt, CallStatus.FAILED)
        try:
            result = await self._server.call(self._own_name, arguments)
            text = "\n".join(block.text for block in result.content if getattr(block, "text", None) is not None)
            if result.is_error:
                status, reason = CallStatus.FAILED, Reason.SERVER_ERROR
        except TimeoutError:
            text = f"{self.name} gave no result within {self._server.timeout_s:g} s"
            status, reason = CallStatus.TIMEOUT, Reason.DEADLINE
        except (mcp.MCPError, OSError, RuntimeError) as error:  # the session is gone, or the server says no
            text, status, reason = f"{self.name} failed: {error}", CallStatus.FAILED, Reason.NO_CONNECTION
        finally:
            self._server.account.settle(cost_usd, cost_usd)
        text = self._server.clean(text)
        receipt = make_receipt(
            self.name,
            service_s=time.monotonic() - start_s,
            fixed_cost_usd=cost_usd,
            status=status,
            reason=reason,
        )
        summary = text.partition("\n")[0][:MAX_SUMMARY_CHARS] if status == CallStatus.OK else str(status)
        return ToolResult(text, summary, receipt, status)


def load_servers(path: str, account: Account | None = None) -> list[McpServer]:
    """Servers from a JSON file, which share `account`: a list of the arguments of `McpServer`, such as

        [{"command": ["uvx", "mcp-server-time"]}, {"url": "https://example.org/mcp", "api_key_variable": "SOME_KEY"}]

    ValueError for a file that cannot be read, an argument that is missing or unknown, and a server that does not start.
    """
    entries, servers = read_entries(path), []
    try:
        for entry in entries:
            servers.append(McpServer(**entry, account=account))
    except (TypeError, ValueError) as error:
        for server in servers:
            server.close()
        raise ValueError(f"an entry of {path} is not understood: {error}") from error
    return servers


def read_entries(path: str) -> list[dict[str, object]]:
    """What the file says of each server; ValueError if it cannot be read, or is no list of objects."""
    try:
        entries = json.loads(pathlib.Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"the MCP file {path} cannot be read: {error}") from error
    if not isinstance(entries, list) or not all(isinstance(entry, Mapping) for entry in entries):
        raise ValueError(f"the MCP file {path} holds no list of JSON objects: write one for each server")
    return entries
