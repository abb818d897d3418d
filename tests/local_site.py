"""A server of the tests' own, on a free port of the loopback: what stands for a hub, a registry or a database speaks its protocol in the handler."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class _Quiet:
    def log_message(self, format: str, *arguments: object) -> None:
        """Tests print nothing."""


@contextmanager
def serving(handler: type[BaseHTTPRequestHandler]) -> Iterator[ThreadingHTTPServer]:
    """It answers until the block is left, and is gone then."""
    with ThreadingHTTPServer(("127.0.0.1", 0), type(handler.__name__, (_Quiet, handler), {})) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


def url(server: ThreadingHTTPServer) -> str:
    return f"http://127.0.0.1:{server.server_port}"
