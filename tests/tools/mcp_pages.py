"""An MCP server over stdio that lists three tools, one a page."""

import asyncio

from mcp import types
from mcp.server.lowlevel import Server
from mcp.server.stdio import stdio_server

NAMES = ("first", "second", "third")


async def list_tools(context, parameters):
    number = int(parameters.cursor) if parameters and parameters.cursor else 0
    tool = types.Tool(name=NAMES[number], input_schema={"type": "object"})
    following = str(number + 1) if number + 1 < len(NAMES) else None
    return types.ListToolsResult(tools=[tool], next_cursor=following)


async def main():
    server = Server("pages", on_list_tools=list_tools)
    async with stdio_server() as (reading, writing):
        await server.run(reading, writing, server.create_initialization_options())


if __name__ == "__main__":
    asyncio.run(main())
