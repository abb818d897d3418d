"""`python -m trainer STAGE --preset P [--set a.b=c]`: argv -> Config -> pipeline.

A TrainerError is printed as it is and ends with its exit code; anything else is our bug and keeps its traceback. The
environment is read here and nowhere else on the trainer's side.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from types import FrameType

from pydantic import BaseModel

from trainer import pipeline, progress, terms, worker
from trainer.config import Config, load, presets
from trainer.errors import Interrupted, TrainerError, disk_full, read_only
from trainer.training import card


def main(arguments: Sequence[str]) -> int:
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        if arguments[:1] == ["push"]:
            return _push(arguments[1:])
        if arguments[:1] == ["doctor"]:
            return _doctor(arguments[1:])
        options = _parser().parse_args(arguments)
        cfg = load(options.preset, options.set)
        environment = {**_environment(cfg), **_one_card(cfg)}
        if options.stage != "plan":
            terms.show_once(cfg)
        path = pipeline.run(cfg, options.stage, lambda lock: worker.Caller(environment, (lock,)))
        print(path)
    except TrainerError as error:
        return _told(error)
    except OSError as error:
        known = disk_full(error) or read_only(error)
        if known is None:
            raise
        return _told(known)
    except KeyboardInterrupt:
        print("trainer: interrupted; what is finished is kept, the same command goes on from there", file=sys.stderr)
        return Interrupted.exit_code
    return 0


def _push(arguments: Sequence[str]) -> int:
    from trainer import push

    push.main(arguments)
    return 0


def _doctor(arguments: Sequence[str]) -> int:
    from trainer import doctor

    return doctor.main(arguments, os.environ)


def _told(error: TrainerError) -> int:
    print(f"trainer: {error}", file=sys.stderr)
    return error.exit_code


def _parser() -> argparse.ArgumentParser:
    stages = "\n".join(f"  {stage.name:<10}{stage.does}" for stage in pipeline.STAGES)
    settings = "\n".join(_settings(Config))
    parser = argparse.ArgumentParser(
        prog="python -m trainer",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description=f"Bring one stage and everything that it needs up to date; `report` is the whole way.\n\nstages:\n{stages}\n\n"
        "beside them: `push OWNER/NAME` puts a release or its adapter on the Hugging Face hub (push --help); "
        "`doctor` says whether this machine is ready (doctor --help)",
        epilog=f"settings (--set section.key=value):\n{settings}\n\nexit codes: 0 done, 2 yours to mend, 3 verify refused, 4 does not fit, "
        "5 out of memory, 6 training stopped, 130 interrupted",
    )
    parser.add_argument("stage", choices=[stage.name for stage in pipeline.STAGES], metavar="STAGE")
    parser.add_argument("--preset", required=True, help=f"one of {', '.join(presets())}, or the path of a .toml")
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE", help="change one setting; may be repeated")
    return parser


def _settings(section: type[BaseModel], prefix: str = "") -> Iterator[str]:
    for name, field in section.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from _settings(field.annotation, f"{prefix}{name}.")
        else:
            about = " ".join((field.description or "").split()).replace("%", "%%")
            yield f"  {prefix + name:<32}{about}".rstrip()


def _environment(cfg: Config) -> dict[str, str]:
    """What worker processes see: this process's environment, with every telemetry off and every cache in paths.cache."""
    cache = cfg.paths.cache.resolve()
    return {
        "PYTORCH_ALLOC_CONF": "expandable_segments:True",  # what is free between two segments counts against a card's 16 GB
        **os.environ,
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "DO_NOT_TRACK": "1",
        "UNSLOTH_DISABLE_STATISTICS": "1",
        "UNSLOTH_COMPILE_LOCATION": str(cache / "unsloth"),
        "TRITON_CACHE_DIR": str(cache / "triton"),
        "TORCHINDUCTOR_CACHE_DIR": str(cache / "inductor"),
        "HF_DATASETS_CACHE": str(cache / "datasets"),
        "TOKENIZERS_PARALLELISM": "true",
    }


def _one_card(cfg: Config) -> dict[str, str]:
    """One card is used: the one that CUDA_VISIBLE_DEVICES names, else the freest. HF would multiply the batch by all it sees."""
    query = shutil.which(card.QUERY[0])
    if cfg.model.device != "cuda" or query is None:
        return {}
    if chosen := os.environ.get("CUDA_VISIBLE_DEVICES"):
        progress.say(f"card: CUDA_VISIBLE_DEVICES={chosen}, the first of it is used")
        return {"CUDA_VISIBLE_DEVICES": chosen.split(",")[0]}
    listed = subprocess.run([query, *card.QUERY[1:]], capture_output=True, text=True, check=False)
    if listed.returncode != 0 or "," not in listed.stdout:
        return {}
    number = card.choose_card(listed.stdout)
    progress.say(f"card: number {number}, the one with the most free memory")
    return {"CUDA_VISIBLE_DEVICES": str(number)}


def _interrupt(_signal: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
