"""The Modelfile says everything, so that no engine has to guess."""

from __future__ import annotations

from trainer.config import Export
from trainer.gguf import modelfile


def test_the_prompt_carries_what_prepare_did_to_every_text() -> None:
    prompt = modelfile.prompt(Export(num_ctx=131072), [("<bos>", "<bos >")], ["user", "assistant"])
    assert prompt.rewrite[0].old == "<bos>" and prompt.strip == ("user", "assistant") and prompt.stop == ("<end_of_turn>",)


def test_the_modelfile_holds_template_stops_and_sampling() -> None:
    text = modelfile.modelfile("x.gguf", modelfile.prompt(Export(num_ctx=131072), [], ["user"]))
    assert text.count('"""') == 2 and f'TEMPLATE """{modelfile.TEMPLATE}"""\n' in text
    for line in (
        'stop "<end_of_turn>"',
        "num_ctx 131072",
        "temperature 1.0",
        "top_k 64",
        "top_p 0.95",
        "min_p 0.0",
        "repeat_penalty 1.0",
        "num_predict 1024",
    ):
        assert f"PARAMETER {line}\n" in text
