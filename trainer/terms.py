"""The licences that a release carries, and the one time that a person is shown the base model's terms."""

from __future__ import annotations

from collections.abc import Sequence

from trainer import progress
from trainer.config import Config
from trainer.manifest import Licence

PROVIDED = "Gemma is provided under and subject to the Gemma Terms of Use found at ai.google.dev/gemma/terms."
PASSED_ON = "Whoever passes it on passes these terms on with it."
GEMMA = Licence(
    applies_to="base",
    name="Gemma Terms of Use",
    notice=f"{PROVIDED} This file holds a modified Gemma: fine-tuned, merged and quantised. {PASSED_ON}",
    url="https://ai.google.dev/gemma/terms",
)
ADAPTER = GEMMA.model_copy(
    update={"notice": f"{PROVIDED} This is an adapter that was trained on Gemma, without Gemma's own weights. {PASSED_ON}"}
)
"""In GEMMA's place where the adapter alone is passed on."""
MIT = Licence(
    applies_to="trainer",
    name="MIT",
    notice="Made with Trinity, which is under the MIT licence; it claims no rights in the model.",
    url="https://opensource.org/license/mit",
)
SHOWN = "gemma_terms_shown.txt"
"""In paths.cache: what was shown there, so that it is not shown again."""


def text(licences: Sequence[Licence]) -> str:
    """LICENSES.txt."""
    return "\n".join(f"{licence.name} ({licence.applies_to}): {licence.url}\n{licence.notice}\n" for licence in licences)


def show_once(cfg: Config) -> None:
    """Before Gemma's weights are fetched for the first time with this cache. Random weights have no terms."""
    shown = cfg.paths.cache / SHOWN
    if cfg.model.name.startswith("random:") or shown.exists():
        return
    said = (
        f"{cfg.model.name} is a Gemma: using it, and passing on what is made from it, is under the {GEMMA.name} ({GEMMA.url}), "
        f"its prohibited uses among them ({GEMMA.url.replace('terms', 'prohibited_use_policy')}); every release carries the notice"
    )
    progress.say(said)
    shown.parent.mkdir(parents=True, exist_ok=True)
    shown.write_text(f"{said}\n", encoding="utf-8")
