"""HTTP to an engine, over aiohttp: a token costs a third of what it costs with httpx2, and so does a request."""

from __future__ import annotations

import asyncio
import io
import json
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, suppress
from functools import cached_property
from typing import Any, NamedTuple

import aiohttp

FAILED = (aiohttp.ClientError, TimeoutError)
"""What a call raises that got no whole reply."""
CONNECT_S = 20.0
"""For connecting alone, which may not hang: all other time-outs belong to admission, or to who asks. It also covers this process's own
turns of the loop when 2,000 requests come at once."""
ASK_S = 600.0
"""For a whole reply: aiohttp waits for ever where a chunk of it is malformed. A prompt of a 12B on a CPU takes minutes."""
END_S = 0.1
"""How long a stream's end may lag behind its last word, before a new connection is the better deal."""


class Reply(NamedTuple):
    status: int
    text: str

    def json(self) -> Any:
        return json.loads(self.text)


class Http:
    """The connections to one engine. `keep_alive`: a request may go over a connection that has had one before."""

    def __init__(self, headers: Mapping[str, str] | None = None, *, keep_alive: bool) -> None:
        self._headers = headers
        self._keep_alive = keep_alive

    async def ask(
        self,
        method: str,
        url: str,
        tree: Any = None,
        *,
        content: AsyncIterator[bytes] | None = None,
        headers: Mapping[str, str] | None = None,
        timeout_s: float = ASK_S,
    ) -> Reply:
        """A whole reply of any status, to `tree` as JSON or to `content`, which may take any time, with headers of its own.

        Raises one of FAILED.
        """
        body: dict[str, Any] = {"data": content, "headers": headers} if tree is None else _json(tree, headers)
        timeout = aiohttp.ClientTimeout(total=None if content else timeout_s, sock_connect=CONNECT_S)
        async with self._session.request(method, url, timeout=timeout, allow_redirects=False, **body) as response:
            return Reply(response.status, await text_of(response))

    @asynccontextmanager
    async def stream(self, url: str, tree: Any, headers: Mapping[str, str] | None = None) -> AsyncIterator[aiohttp.ClientResponse]:
        """A POST's reply, of which only the head was read; leaving it before its end hangs up. It and its reading raise one of FAILED."""
        try:
            response = await self._session.post(url, allow_redirects=False, **_json(tree, headers))
        except aiohttp.ClientConnectorError:
            raise
        except (aiohttp.ServerDisconnectedError, aiohttp.ClientOSError):
            if not self._keep_alive:
                raise
            # a kept connection that the other side closed as the request was under way: nothing of a reply had come
            response = await self._session.post(url, allow_redirects=False, **_json(tree, headers))
        async with response:
            yield response

    async def close(self) -> None:
        if "_session" in self.__dict__:
            await self._session.close()

    @cached_property
    def _session(self) -> aiohttp.ClientSession:
        """Made by the first call, since it belongs to a running loop."""
        return aiohttp.ClientSession(
            headers={"Accept-Encoding": "identity", **(self._headers or {})},
            connector=aiohttp.TCPConnector(limit=0, force_close=not self._keep_alive),  # 0: admission has the limit
            cookie_jar=aiohttp.DummyCookieJar(),
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_S),
        )


async def text_of(response: aiohttp.ClientResponse) -> str:
    return (await response.read()).decode("utf-8", "replace")


async def let_end(response: aiohttp.ClientResponse) -> None:
    """Read what is left of a stream whose last word has come: then its connection can be used again, else it is closed."""
    with suppress(*FAILED):
        async with asyncio.timeout(END_S):
            async for _ in response.content.iter_any():
                pass


def _json(tree: Any, headers: Mapping[str, str] | None) -> dict[str, Any]:
    body = io.BytesIO(json.dumps(tree, ensure_ascii=False).encode())  # as a file: aiohttp warns of bytes that are a MiB or more
    return {"data": body, "headers": {"Content-Type": "application/json", **(headers or {})}}
