"""The licences that a release carries, and the one time that a person is shown the base model's terms."""

from __future__ import annotations

from trainer import progress
from trainer.config import Config
from trainer.manifest import Licence

GEMMA = Licence(
    applies_to="base",
    name="Gemma Terms of Use",
    notice=(
        "Gemma is provided under and subject to the Gemma Terms of Use found at ai.google.dev/gemma/terms. "
        "This file holds a modified Gemma: fine-tuned, merged and quantised. Whoever passes it on passes these terms on with it."
    ),
    url="https://ai.google.dev/gemma/terms",
)
MIT = Licence(
    applies_to="trainer",
    name="MIT",
    notice="Made with Trinity, which is under the MIT licence; it claims no rights in the model.",
    url="https://opensource.org/license/mit",
)
SHOWN = "gemma_terms_shown.txt"
"""In paths.cache: what was shown there, so that it is not shown again."""


def show_once(cfg: Config) -> None:
    """Before Gemma's weights are fetched for the first time with this cache. Random weights have no terms."""
    shown = cfg.paths.cache / SHOWN
    if cfg.model.name.startswith("random:") or shown.exists():
        return
    text = (
        f"{cfg.model.name} is a Gemma: using it, and passing on what is made from it, is under the {GEMMA.name} ({GEMMA.url}), "
        f"its prohibited uses among them ({GEMMA.url.replace('terms', 'prohibited_use_policy')}); every release carries the notice"
    )
    progress.say(text)
    shown.parent.mkdir(parents=True, exist_ok=True)
    shown.write_text(f"{text}\n", encoding="utf-8")
