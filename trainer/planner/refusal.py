"""Whether a run fits what there is, and if not why, and which changes do fit. The plan asks it of a named card, train of the card's free memory."""

from __future__ import annotations

from collections.abc import Sequence

from trainer.config import Config
from trainer.errors import DoesNotFitError
from trainer.gemma3 import Size
from trainer.planner import remedy
from trainer.planner.budget import Budget, budget
from trainer.planner.remedy import Remedy

NO_WAY = "  no single setting makes it fit: lower data.max_tokens and adapter.rank together, or take a smaller model"


def require(cfg: Config, size: Size, *, where: str, free_bytes: int, total_bytes: int, holders: Sequence[str] = ()) -> None:
    """free_bytes of the card's total_bytes are free; holders: sentences about who has the rest and how it is freed.

    Where the run would fit without them, nothing of the run is to be given up: they are named instead.

    Raises:
        DoesNotFitError: the forecast of reserved bytes and the CUDA context is more than what is free.
    """
    found = budget(cfg, size)
    if found.needed_bytes <= free_bytes:
        return
    if holders and found.needed_bytes <= total_bytes:
        missing = f"needs {gb(found.needed_bytes)}, {gb(free_bytes)} of the {gb(total_bytes)} of the {where} are free"
        raise DoesNotFitError(
            f"does not fit beside other processes: {missing}; it fits once they have let go:", *(f"  {one}" for one in holders)
        )
    why = refusal(cfg, found, where, free_bytes, remedy.remedies(cfg, size, free_bytes))
    raise DoesNotFitError(*why, *(f"  {one}" for one in holders))


def refusal(cfg: Config, found: Budget, where: str, available_bytes: int, ways: Sequence[Remedy]) -> list[str]:
    """Why not, and which changes do fit."""
    term, num_bytes, setting = remedy.largest_movable(cfg, found)
    missing_bytes = found.needed_bytes - available_bytes
    missing = f"needs {gb(found.needed_bytes)}, the {where} has {gb(available_bytes)}, {gb(missing_bytes)} are missing"
    movable = f"the largest part that a setting moves is {term}, {gb(num_bytes)} ({setting})"
    return [f"does not fit: {missing}; {movable}", *(shown(ways) or [NO_WAY])]


def shown(ways: Sequence[Remedy]) -> list[str]:
    return [f"  --set {way.setting:<30} needs {gb(way.needed_bytes)}; costs: {way.cost}" for way in ways]


def gb(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:.2f} GB" if num_bytes >= 1e7 else f"{num_bytes / 1e6:.2f} MB"
