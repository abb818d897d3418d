"""The application: the gateway's paths over one engine, behind its guards."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import APIRouter, FastAPI
from fastapi.responses import Response
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware

from server import docs, metrics, page
from server.admission import Admission, Timeouts
from server.auth import Guard, Keys, is_loopback
from server.engines import Engine
from server.errors import ServerError
from server.limits import BodyClock, Limiter
from server.logs import Requests
from server.metrics import Metrics
from server.release import Keeper
from server.replies import on_bug, on_error, on_http_error
from server.routes import Gateway, router
from server.settings import Settings


def make_engine(settings: Settings) -> Engine:
    if settings.engine == "ollama":
        from server.engines.ollama import OllamaEngine

        return OllamaEngine(str(settings.ollama_url), settings.slots)
    if settings.engine == "openai":
        from server.engines.openai import OpenAIEngine

        key = settings.openai_key.get_secret_value() if settings.openai_key else ""
        return OpenAIEngine(str(settings.openai_url), settings.slots, key, settings.openai_model)
    from server.engines.embedded import EmbeddedEngine

    return EmbeddedEngine(settings.slots, settings.num_threads, settings.start_timeout_s)


def create_app(settings: Settings, engine: Engine) -> FastAPI:
    """The engine is loaded in the background once the application starts, and closed when it stops.

    `app.state.admission` is there for whoever stops the server. Raises SetupError when the file of keys is broken.
    """
    keeper = Keeper(settings.releases, engine, settings.state, wait_for_loader=settings.wait_for_loader)
    counts = Metrics()
    timeouts = Timeouts(settings.queue_timeout_s, settings.first_token_timeout_s, settings.stall_timeout_s, settings.total_timeout_s)
    admission = Admission(engine.slots, settings.waiting, timeouts, counts)

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

    # server.docs has the pages: FastAPI's own load their scripts from a CDN.
    app = FastAPI(title="Trinity", lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)
    app.state.admission = admission
    _guard(app, settings, counts)
    app.add_exception_handler(ServerError, on_error)
    app.add_exception_handler(HTTPException, on_http_error)
    app.add_exception_handler(Exception, on_bug)
    app.include_router(router(Gateway(settings, engine, keeper, admission)))
    app.include_router(_metrics(counts, keeper))
    app.include_router(docs.router())
    app.include_router(page.router())
    return app


def _guard(app: FastAPI, settings: Settings, counts: Metrics) -> None:
    """The middlewares, innermost first."""
    app.add_middleware(BodyClock, timeout_s=settings.body_timeout_s)
    app.add_middleware(
        Guard,
        keys=Keys.open(settings.keys_file),
        limiter=Limiter(),
        local=is_loopback(settings.host),
        allowed_hosts=settings.allowed_hosts,
    )
    if settings.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=settings.cors_origins,
            allow_methods=["GET", "POST"],
            allow_headers=["Authorization", "Content-Type", "X-Request-ID"],
            expose_headers=["X-Request-ID", "Retry-After"],
        )
    app.add_middleware(Requests, metrics=counts)


def _metrics(counts: Metrics, keeper: Keeper) -> APIRouter:
    paths = APIRouter()

    @paths.get("/metrics", include_in_schema=False)
    async def show() -> Response:
        """Everything in Prometheus' text format."""
        try:
            release = keeper.serving()
            counts.serve(release.model, release.manifest.release)
        except ServerError:
            counts.serve("", "")
        return Response(counts.text(), headers={"Content-Type": metrics.CONTENT_TYPE})

    return paths
