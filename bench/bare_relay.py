"""What any gateway on FastAPI costs: a relay that reads a body, asks the engine and passes its bytes on, and does nothing else.

    python -m bench.bare_relay --engine-url http://127.0.0.1:11434     # prints its port

No keys, no limits, no validation, no time-outs, no events of its own: a floor for bench.gateway, on the same server and client libraries.
"""

from __future__ import annotations

import argparse
import asyncio
import socket
import sys
from collections.abc import AsyncIterator

import aiohttp
import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import StreamingResponse


def app_of(engine_url: str) -> FastAPI:
    app = FastAPI()
    sessions: list[aiohttp.ClientSession] = []  # made by the first request, inside the running loop

    @app.post("/api/chat")
    async def chat(request: Request) -> StreamingResponse:
        if not sessions:
            sessions.append(aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)))
        body = await request.body()
        response = await sessions[0].post(f"{engine_url}/api/chat", data=body, headers={"Content-Type": "application/json"})
        first = await response.content.readany()

        async def rest() -> AsyncIterator[bytes]:
            yield first
            async for chunk in response.content.iter_any():
                yield chunk

        return StreamingResponse(rest(), media_type="application/x-ndjson")

    return app


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engine-url", required=True)
    options = parser.parse_args(arguments)
    listener = socket.create_server(("127.0.0.1", 0))
    print(listener.getsockname()[1], flush=True)
    server = uvicorn.Server(uvicorn.Config(app_of(options.engine_url), loop="asyncio", http="h11", log_level="error", access_log=False))
    asyncio.run(server.serve(sockets=[listener]))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
