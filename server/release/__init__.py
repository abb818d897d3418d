"""Releases in service: which one is wanted (state), the loader that brings it to an engine, the keeper that serves it in the gateway."""

from __future__ import annotations

from server.release.keeper import Keeper, first_look, no_release

__all__ = ["Keeper", "first_look", "no_release"]
