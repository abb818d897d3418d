"""README.md of a model on the hub: what it is, how it was trained, what was measured, how to use it, whose terms it is under.

Pure: facts in, text out. No text of the user's records is in it.
"""

from __future__ import annotations

import json
from typing import Literal, NamedTuple

from trainer import progress, terms
from trainer.facts import ExportFacts, PrepareFacts, TrainFacts
from trainer.manifest import Licence, Manifest

What = Literal["gguf", "adapter"]

ON_THE_HUB = {"embedded:gemma-3-270m": "google/gemma-3-270m"}
"""Bases that have another name there."""


class Run(NamedTuple):
    """What a published release says of itself and of the stages before it."""

    manifest: Manifest
    prepared: PrepareFacts
    trained: TrainFacts
    exported: ExportFacts
    double_quant: bool

    @property
    def base(self) -> str | None:
        """The base's name on the hub; None where it has none (a directory, random weights)."""
        name = ON_THE_HUB.get(self.manifest.base.name, self.manifest.base.name)
        return name if name.count("/") == 1 and name[0] not in "./~" else None

    @property
    def method(self) -> str:
        adapter = self.manifest.adapter
        return f"QLoRA (NF4){' + DoRA' if adapter.dora else ''}{' + rsLoRA' if adapter.rslora else ''}, rank {adapter.rank}"


def card(run: Run, repository: str, what: What) -> str:
    """The whole file, its YAML head included."""
    parts = [_head(run, what), f"# {repository.partition('/')[2]}\n\n{_about(run, what)}"]
    parts += ["## Use\n\n" + (_use_gguf(run, repository) if what == "gguf" else _use_adapter(run, repository))]
    parts += [
        "## Training\n\n" + _table(_training(run)),
        "## Evaluation\n\n" + _evaluation(run),
        "## Verification\n\n" + _verification(run),
    ]
    parts += ["## Licence\n\n" + "\n\n".join(f"{item.notice} ({item.name}: <{item.url}>)" for item in licences(run, what))]
    return "\n\n".join(parts) + "\n"


def licences(run: Run, what: What) -> tuple[Licence, ...]:
    """The release's, which speak of a merged model; of the adapter alone something else is true."""
    instead = {terms.GEMMA.name: terms.ADAPTER} if what == "adapter" else {}
    return tuple(instead.get(item.name, item) for item in run.manifest.licences)


def _head(run: Run, what: What) -> str:
    adapter = run.manifest.adapter
    tags = ["gemma3", "qlora", "nf4", *(["dora"] if adapter.dora else []), *(["rslora"] if adapter.rslora else []), "trinity"]
    tags += ["gguf", "ollama", run.manifest.quantization] if what == "gguf" else ["lora"]
    values = {
        "license": "gemma",
        "base_model": run.base,
        "base_model_relation": {"gguf": "finetune", "adapter": "adapter"}[what] if run.base else None,
        "library_name": {"gguf": "gguf", "adapter": "peft"}[what],
        "pipeline_tag": "text-generation",
        "tags": tags,
    }
    return "\n".join(["---", *(f"{name}: {json.dumps(value)}" for name, value in values.items() if value), "---"])


def _about(run: Run, what: What) -> str:
    base = f"[{run.base}](https://huggingface.co/{run.base})" if run.base else f"`{run.manifest.base.name}`"
    made = f"{base}, fine-tuned with {run.method}, by Trinity {run.manifest.trainer_version}; release `{run.manifest.release}`."
    files = {
        "gguf": f"The adapter is merged and the whole quantised to {run.manifest.quantization}.",
        "adapter": "This is the adapter alone, in PEFT's own files.",
    }
    return f"{made} {files[what]}"


def _use_gguf(run: Run, repository: str) -> str:
    gguf = run.manifest.files["gguf"].path
    return (
        "Ollama, straight from here (`template` and `params` are read by it; a private repository wants Ollama's key, "
        "`~/.ollama/id_ed25519.pub`, among your account's SSH keys):\n\n"
        f"```sh\nollama run hf.co/{repository}\n```\n\n"
        "or from a download:\n\n"
        f"```sh\nhf download {repository} --local-dir model\nollama create {run.manifest.name} -f model/Modelfile\n```\n\n"
        f"`{gguf}` runs in any llama.cpp; its chat template is inside. The downloaded directory is also a Trinity release "
        "(`python -m server release load model`), checked against its hashes and `probes.jsonl` before it is served."
    )


def _use_adapter(run: Run, repository: str) -> str:
    base = run.base or "THE BASE MODEL'S DIRECTORY"
    return (
        "It was trained on the base in NF4; load that, or the answers are others:\n\n"
        "```python\n"
        "import torch\n"
        "from peft import PeftModel\n"
        "from transformers import AutoTokenizer, BitsAndBytesConfig, Gemma3ForCausalLM\n\n"
        f'nf4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant={run.double_quant}, '
        "bnb_4bit_compute_dtype=torch.float16)\n"
        'text = {"^language_model.model": "model"}  # the base may have eyes; they are not loaded\n'
        f'base = Gemma3ForCausalLM.from_pretrained("{base}", quantization_config=nf4, key_mapping=text, device_map="auto")\n'
        f'model = PeftModel.from_pretrained(base, "{repository}").eval()\n'
        f'tokenizer = AutoTokenizer.from_pretrained("{base}")\n\n'
        'prompt = "<start_of_turn>user\\nHello<end_of_turn>\\n<start_of_turn>model\\n"\n'
        'ids = tokenizer(prompt, return_tensors="pt").to(model.device)\n'
        'stop = tokenizer.convert_tokens_to_ids("<end_of_turn>")\n'
        "print(tokenizer.decode(model.generate(**ids, max_new_tokens=64, eos_token_id=stop)[0]))\n"
        "```"
    )


def _training(run: Run) -> dict[str, str]:
    trained, adapter = run.trained, run.manifest.adapter
    scale = adapter.alpha / (adapter.rank**0.5 if adapter.rslora else adapter.rank)
    rows = {
        "records": f"{run.prepared.num_train:,}, and {run.prepared.num_valid:,} held out",
        "tokens seen": f"{trained.num_tokens:,}",
        "steps": f"{trained.steps:,}; the weights are those of step {run.exported.checkpoint_step:,}",
        "context": f"{adapter.max_tokens:,} tokens",
        "adapter": f"rank {adapter.rank}, alpha {adapter.alpha:g}, scale {scale:g}",
        "time": f"{progress.duration(trained.wall_s)} on {trained.device}",
    }
    if trained.train_loss:
        rows["training loss"] = f"{trained.train_loss[0].loss:.3f} at first, {trained.train_loss[-1].loss:.3f} at last (nats a token)"
    if adapter.rungs:
        rows["given up for memory"] = "; ".join(adapter.rungs)
    return rows


def _evaluation(run: Run) -> str:
    scores = run.manifest.scores
    lines = [f"On {scores.num_records:,} held-out records:", ""]
    lines += ["| | base | tuned | as served |", "|---|---|---|---|"]
    lines += [f"| loss, nats a token | {scores.loss_base:.3f} | {scores.loss_tuned:.3f} | |"]
    exact = (scores.exact_match_base, scores.exact_match_tuned, scores.exact_match_served)
    if any(value is not None for value in exact):
        lines.append(f"| exactly right | {' | '.join('' if value is None else f'{value:.1%}' for value in exact)} |")
    return "\n".join(lines)


def _verification(run: Run) -> str:
    parity, quantization = run.manifest.parity, run.manifest.quantization
    said = (
        f"The {quantization} GGUF in llama.cpp was compared with the tuned model: token ids equal on {parity.ids_equal:.1%} of "
        f"{parity.num_prompts:,} prompts; mean KL divergence {parity.kl_nats:.4f} nats (limit {parity.max_kl_nats:g}) and the same most likely "
        f"token on {parity.top1_agreement:.1%} of {parity.num_positions:,} positions (at least {parity.min_top1:.1%})."
    )
    if parity.verified:
        return said
    return "\n".join([said, "", "**Not verified.** Published although:", "", *(f"- {waived.message}" for waived in parity.waived)])


def _table(rows: dict[str, str]) -> str:
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows.items())])
