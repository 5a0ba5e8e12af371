"""An MCP server for the tests: over stdio, or over HTTP at the port that is given."""

import asyncio
import os
import sys

from mcp.server import MCPServer

server = MCPServer("tests")


@server.tool()
def add(a: float, b: float) -> str:
    """Adds two numbers."""
    return f"{a + b:g}"


@server.tool()
def fail() -> str:
    """Fails."""
    raise RuntimeError("on purpose")


@server.tool()
def environment() -> str:
    """Tells what it was given."""
    return "\n".join(f"{name}={value}" for name, value in sorted(os.environ.items()))


@server.tool()
async def nap(seconds: float) -> str:
    """Sleeps."""
    await asyncio.sleep(seconds)
    return "awake"


@server.tool()
def die() -> str:
    """Ends the server in the middle of the call."""
    os._exit(1)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        server.run(transport="streamable-http", host="127.0.0.1", port=int(sys.argv[1]))
    else:
        server.run(transport="stdio")
