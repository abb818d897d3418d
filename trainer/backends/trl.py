"""Wall around TRL: an SFTTrainer that takes rows of token ids as they are, and tells an Observer what happens.

What of TRL's and HF's is switched off, and why:
- both precision flags: they bring autocast and a GradScaler; the model's own dtypes are the arithmetic;
- dataset preparation, packing, padding-free: rows come tokenized, and batches from trainer.training.batches;
- compute_loss: TRL 1.15's fused head is a Triton kernel that no CPU runs; ours is trainer.kernels.loss;
- the cast of a quantised model's adapter to bfloat16: a T4 has none, and small updates would vanish in it;
- clipping, and the norm that is taken even without it: the optimizer that is handed in scales, clips and skips by itself;
- counting tokens on the card, which waits for it in every micro-batch: a batch knows its own number;
- the NaN filter, which hides the first bad loss; model cards; telemetry; bars and prints.

The module is only imported once the model is there: unsloth must come before trl.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from datasets import Dataset
from transformers import PreTrainedTokenizerFast, PrinterCallback, TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from trl import SFTConfig, SFTTrainer

from trainer.config import Train
from trainer.kernels.loss import Hidden, Summed, of_batch, summed_cross_entropy

R = TypeVar("R")


class Observer(Protocol):
    """Who watches the training: trainer.training.loop."""

    def began(self, state: Any) -> None:
        """Before the first step of this process; state is HF's TrainerState."""

    def stepped(self, state: Any) -> None:
        """An optimizer step is done."""

    def logged(self, step: int, figures: Mapping[str, float]) -> None: ...
    def due(self) -> bool:
        """Asked after each step: True saves a checkpoint."""

    def stop(self) -> bool:
        """Asked after each micro-batch: True saves a checkpoint, of the last whole step, and ends the training."""


class Stepper(Protocol):
    """The optimizer: trainer.training.scaling. It clips, and skips a step whose gradients overflowed; HF's schedule goes on then."""

    scale: float
    grad_norm: float | None


class Trainer(SFTTrainer):
    """SFTTrainer with its loss, its files and its talk replaced; its loop, schedule and resume are used."""

    hidden: Hidden
    summed: Summed
    stepper: Stepper
    save_adapter: Callable[[Path], None]
    seal: Callable[[Path], object]
    partial: Path
    """Where a checkpoint is written before seal() moves it to its place."""
    saved_step: int = 0
    """Whose checkpoint is on disk; before the first step there is nothing to save."""
    marked: tuple[int, float, tuple[Any, ...]]

    def compute_loss(self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None) -> Any:
        """Mean over the supervised tokens of the whole optimizer step: each micro-batch adds its sum / num_items_in_batch.

        Its value is what is logged; the loss scale comes in where backward begins. Whether it is a number is asked once a step, by
        the observer, since asking here would wait for the card in every micro-batch.
        """
        assert num_items_in_batch is not None and not return_outputs
        head = _base(model).get_output_embeddings().weight
        loss = of_batch(inputs, self.hidden, head, self.summed) / num_items_in_batch
        loss.register_hook(lambda grad: grad * self.stepper.scale)
        return loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs and self.stepper.grad_norm is not None:
            logs["grad_norm"] = self.stepper.grad_norm
        super().log(logs, start_time)

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> None:
        """None: the stepper takes it."""

    def _track_num_input_tokens(self, inputs: Mapping[str, Any]) -> None:
        self.state.num_input_tokens_seen += inputs["num_tokens"]

    def create_model_card(self, *_: Any, **__: Any) -> None:
        """None: the adapter's own two files say what it is."""

    def _send_telemetry(self) -> None:
        """None."""

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        assert output_dir is not None
        Path(output_dir).mkdir(parents=True, exist_ok=True)
        self.save_adapter(Path(output_dir))

    def _get_output_dir(self, trial: Any) -> str:
        return str(self.partial)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        super()._save_checkpoint(model, trial)
        self.seal(self.partial / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}")
        self.partial.rmdir()
        self.saved_step = self.state.global_step

    def _run_epoch(self, *arguments: Any, **named: Any) -> None:
        """HF looks for the end after a step only: a training that was saved at its last one, and not published, would make another."""
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return
        super()._run_epoch(*arguments, **named)

    def mark(self) -> None:
        """Remember what micro-batches move, as it is between two steps; weights and optimizer move only in a step."""
        cuda = torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None
        states = (random.getstate(), np.random.get_state(), torch.get_rng_state(), cuda)  # noqa: NPY002 - the global one, as HF saves it
        self.marked = (self.state.num_input_tokens_seen, self.current_flos, states)

    def back_to_mark(self) -> None:
        """Forget the micro-batches since."""
        self.state.num_input_tokens_seen, self.current_flos, (python, numpy, cpu, cuda) = self.marked
        random.setstate(python)
        np.random.set_state(numpy)  # noqa: NPY002 - as above
        torch.set_rng_state(cpu)
        if cuda is not None:
            torch.cuda.set_rng_state(cuda)


def _base(model: Any) -> Any:
    return model.get_base_model() if hasattr(model, "get_base_model") else model


class _Events(TrainerCallback):
    def __init__(self, observer: Observer) -> None:
        self._observer = observer
        self.trainer: Trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.trainer.saved_step = state.global_step
        self._observer.began(state)

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.trainer.mark()

    def on_substep_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Amid a step: what its micro-batches gathered is given up, and the state of the step before is saved."""
        if self._observer.stop():
            self.trainer.back_to_mark()
            self._end(state, control)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._observer.stepped(state)
        if self._observer.stop():
            self._end(state, control)
        elif self._observer.due():
            control.should_save = True

    def _end(self, state: Any, control: Any) -> None:
        control.should_training_stop = True
        control.should_save = state.global_step != self.trainer.saved_step

    def on_log(self, args: Any, state: Any, control: Any, logs: Mapping[str, float] | None = None, **_: Any) -> None:
        self._observer.logged(state.global_step, logs or {})


def trainer(
    model: Any,
    rows: Sequence[R],
    tensors: Callable[[list[R]], Mapping[str, Any]],
    *,
    train: Train,
    accumulation: int,
    every_steps: int,
    partial: Path,
    device: str,
    checkpointing: bool,
    optimizer: Stepper,
    save_adapter: Callable[[Path], None],
    seal: Callable[[Path], object],
    observer: Observer,
    hidden: Hidden | None = None,
    summed: Summed = summed_cross_entropy,
) -> Trainer:
    """The trainer of one attempt; `train(resume_from_checkpoint=...)` runs it.

    optimizer: a torch optimizer, too. tensors: makes batches as trainer.training.model does. hidden: the final hidden states of a
    batch's inputs; without it the model's own forward pass.
    """
    trainable = [(parameter, parameter.data) for parameter in model.parameters() if parameter.requires_grad]
    events = _Events(observer)
    made = Trainer(
        model=model,
        args=_arguments(train, accumulation, every_steps, partial, device, checkpointing),
        data_collator=lambda picked: tensors([rows[item["row"]] for item in picked]),
        train_dataset=Dataset.from_dict({"row": list(range(len(rows)))}),
        processing_class=_no_tokenizer(),
        optimizers=(optimizer, None),
        callbacks=[events],
    )
    events.trainer = made
    for parameter, data in trainable:
        parameter.data = data  # TRL cast them to bfloat16
    made.processing_class = None  # else each checkpoint would hold a copy
    made.remove_callback(PrinterCallback)
    made.save_adapter, made.seal, made.partial = save_adapter, seal, partial
    made.hidden = hidden or (lambda inputs: _base(model).model(**inputs, use_cache=False).last_hidden_state)
    made.summed, made.stepper = summed, optimizer
    return made


def _arguments(train: Train, accumulation: int, every_steps: int, partial: Path, device: str, checkpointing: bool) -> SFTConfig:
    return SFTConfig(
        output_dir=str(partial),
        per_device_train_batch_size=train.batch_records,
        gradient_accumulation_steps=accumulation,
        num_train_epochs=train.epochs,
        max_steps=train.max_steps or -1,
        learning_rate=train.learning_rate,
        lr_scheduler_type=train.schedule if train.schedule != "constant" else "constant_with_warmup",
        warmup_steps=train.warmup_steps,
        max_grad_norm=0.0,
        weight_decay=train.weight_decay,
        seed=train.seed,
        data_seed=train.seed,
        fp16=False,
        bf16=False,
        gradient_checkpointing=checkpointing,
        gradient_checkpointing_kwargs={"use_reentrant": False} if checkpointing else None,
        logging_steps=1,
        logging_nan_inf_filter=False,
        eval_strategy="no",
        save_strategy="steps",
        save_steps=every_steps,
        include_num_input_tokens_seen="non_padding",
        report_to=train.report_to,
        use_cpu=device == "cpu",
        dataloader_pin_memory=device == "cuda",
        remove_unused_columns=False,
        dataset_kwargs={"skip_prepare_dataset": True},
        max_length=None,
        disable_tqdm=True,
        log_level="error",
    )


def _no_tokenizer() -> PreTrainedTokenizerFast:
    """SFTTrainer insists on a tokenizer; rows are ids already, so it gets an empty one."""
    from tokenizers import Tokenizer, models

    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"<pad>": 0}, "<pad>")), pad_token="<pad>")  # noqa: S106 - no password
