"""How the served model is prompted: Ollama's TEMPLATE, stops and sampling, as the manifest's Prompt and as a Modelfile.

An explicit template is a must: without one Ollama guesses, from the GGUF or not at all, and renders other tokens than the
model was trained on. This one renders what HF's template renders, for text that is stripped and without an empty system
message, since Go's templates cannot trim: hence Prompt.rewrite and Prompt.strip.
"""

from __future__ import annotations

from collections.abc import Iterable

from trainer.config import Export
from trainer.manifest import Prompt, Rewrite

TEMPLATE = """\
{{- $sys := .System }}{{- range $i, $_ := .Messages }}{{- $last := eq (len (slice $.Messages $i)) 1 }}\
{{- if eq .Role "user" }}<start_of_turn>user
{{ if $sys }}{{ $sys }}

{{ $sys = "" }}{{ end }}{{ .Content }}<end_of_turn>
{{ if $last }}<start_of_turn>model
{{ end }}{{- else if eq .Role "assistant" }}<start_of_turn>model
{{ .Content }}{{ if not $last }}<end_of_turn>
{{ end }}{{- end }}{{- end }}"""

STOP = ("<end_of_turn>",)

CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{%- set turns = namespace(system='') -%}"
    "{%- for message in messages -%}"
    "{%- if message['role'] == 'system' -%}"
    "{%- set turns.system = message['content'] + '\\n\\n' -%}"
    "{%- else -%}"
    "{{ '<start_of_turn>' + ('model' if message['role'] == 'assistant' else 'user') + '\\n' }}"
    "{{ turns.system + message['content'] | trim + '<end_of_turn>\\n' }}"
    "{%- set turns.system = '' -%}"
    "{%- endif -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<start_of_turn>model\\n' }}{%- endif -%}"
)
"""The same in Jinja, kept in the GGUF for engines that read it there (llama-server, LM Studio): they would take ChatML otherwise."""


def prompt(export: Export, rewrite: Iterable[tuple[str, str]], strip: Iterable[str]) -> Prompt:
    """rewrite, strip: what prepare did to every text (trainer.dataset.template); the gateway does the same."""
    return Prompt(
        template=TEMPLATE,
        stop=STOP,
        num_ctx=export.num_ctx,
        sampling=export.sampling,
        rewrite=tuple(Rewrite(old=old, new=new) for old, new in rewrite),
        strip=tuple(strip),  # pydantic checks the roles
    )


def modelfile(gguf_name: str, prompt: Prompt) -> str:
    """The text of a Modelfile beside the GGUF. The closing quotes stand directly after the template: a newline would be rendered."""
    parameters = {"num_ctx": prompt.num_ctx, **prompt.sampling.model_dump()}
    lines = [f"FROM ./{gguf_name}", f'TEMPLATE """{prompt.template}"""']
    lines += [f'PARAMETER stop "{text}"' for text in prompt.stop]
    lines += [f"PARAMETER {name} {value}" for name, value in parameters.items()]
    return "\n".join(lines) + "\n"
