"""The application: the gateway's paths over one engine."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI
from starlette.exceptions import HTTPException

from server import page
from server.admission import Admission
from server.engines import Engine
from server.errors import ServerError
from server.release import Keeper
from server.replies import RequestIds, on_bug, on_error, on_http_error
from server.routes import Gateway, router
from server.settings import Settings


def make_engine(settings: Settings) -> Engine:
    if settings.engine == "ollama":
        from server.engines.ollama import OllamaEngine

        return OllamaEngine(str(settings.ollama_url), settings.slots)
    from server.engines.embedded import EmbeddedEngine

    return EmbeddedEngine(settings.slots, settings.num_threads, settings.start_timeout_s)


def create_app(settings: Settings, engine: Engine) -> FastAPI:
    """The engine is loaded in the background once the application starts, and closed when it stops."""
    keeper = Keeper(settings.releases, engine, settings.state)
    admission = Admission(engine.slots, settings.waiting, settings.queue_timeout_s, settings.stall_timeout_s)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        keeping = asyncio.create_task(keeper.run())
        keeping.add_done_callback(keeper.ended)
        try:
            yield
        finally:
            keeping.cancel()
            await asyncio.gather(keeping, return_exceptions=True)
            await engine.close()

    # No docs page: FastAPI's own loads its scripts from a CDN.
    app = FastAPI(title="Trinity", lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)
    app.add_middleware(RequestIds)
    app.add_exception_handler(ServerError, on_error)
    app.add_exception_handler(HTTPException, on_http_error)
    app.add_exception_handler(Exception, on_bug)
    app.include_router(router(Gateway(settings, engine, keeper, admission)))
    app.include_router(page.router())
    return app
