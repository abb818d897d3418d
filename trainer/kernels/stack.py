"""All decoder layers of one model instance as ours, from token ids to the final hidden states.

`install` swaps the sub-modules of the instance that it is given and nothing else; a piece that cannot be installed is an error.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from trainer import gemma3
from trainer.config import Kernels
from trainer.errors import ConfigError, MachineError, ModelError
from trainer.kernels import attention, loss, nf4, plain
from trainer.kernels.dora import Adapter, Group
from trainer.kernels.layer import Batch, Layer, Norms, Pieces, Shape, Span, Way
from trainer.kernels.offload import Arena, Waiting

GROUPS = {
    "qkv": ("self_attn", ("q_proj", "k_proj", "v_proj")),
    "o": ("self_attn", ("o_proj",)),
    "gate_up": ("mlp", ("gate_proj", "up_proj")),
    "down": ("mlp", ("down_proj",)),
}
ADAPTER = "default"
ROUND = 64
"""Rows are filled up to a multiple of it by one more document, so that every product is aligned and no length compiles anew."""


class _FinalNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TH: Tensor, w_H: Tensor, eps: float, dtype: torch.dtype, ops: ModuleType) -> Tensor:
        ctx.save_for_backward(x_TH, w_H)
        ctx.eps, ctx.ops = eps, ops
        return ops.rms(x_TH, w_H, eps, dtype)  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x_TH, w_H = ctx.saved_tensors
        dx_TH = torch.zeros_like(x_TH)
        ctx.ops.rms_backward_(grads[0].contiguous(), x_TH, w_H, ctx.eps, dx_TH)
        return dx_TH, None, None, None, None


class Gradients:
    """Adapter gradients that wait in pinned memory from the end of their layer to the optimizer's step."""

    def __init__(self, parameters: Sequence[Tensor]) -> None:
        self._arena = Arena(sum(-(-4 * one.numel() // 4096) * 4096 for one in parameters))
        self._parameters = list(parameters)
        self._host = {one: self._arena.take(tuple(one.shape), torch.float32) for one in parameters}
        self._filled: set[Tensor] = set()

    @property
    def pinned_bytes(self) -> int:
        return self._arena.num_bytes

    def take(self, parameters: list[Tensor], grads: list[Tensor]) -> list[Tensor | None]:
        """Away with them; autograd gets none. A further micro-batch adds to what waits."""
        for parameter, grad in zip(parameters, grads, strict=True):
            host = self._host[parameter]
            assert host is not None
            total = grad + host.to(grad.device, non_blocking=True) if parameter in self._filled else grad
            host.copy_(total, non_blocking=True)
            self._filled.add(parameter)
        return [None] * len(grads)

    def gather(self) -> None:
        """Before the optimizer's step: every gradient in its parameter's .grad."""
        for parameter in self._filled:
            host = self._host[parameter]
            assert host is not None
            parameter.grad = host.to(parameter.device, non_blocking=True)
        self._filled.clear()


class Settings(NamedTuple):
    """What `install` needs of a config. max_tokens: of a row; scale: of B A; kept: see planner.keep."""

    kernels: Kernels
    dtype: torch.dtype
    scale: float
    max_tokens: int
    kept: Mapping[int, Mapping[str, str]]


class Stack:
    """The installed layers, and the ways in."""

    def __init__(self, inner: Any, layers: Sequence[Layer], size: gemma3.Size, settings: Settings, pieces: Pieces, kind: type) -> None:
        self.layers, self.size = tuple(layers), size
        self._settings, self._pieces, self._kind = settings, pieces, kind
        self._embedding, self._final = inner.embed_tokens.weight, inner.norm.weight
        device = self._embedding.device
        step = settings.kernels.span_layers
        self._spans = [self.layers[start : start + step] for start in range(0, len(self.layers), step)]
        arena = Arena(self._arena_bytes()) if settings.kernels.offload == "ours" and device.type == "cuda" else None
        self._waiting = Waiting(arena, pieces.rest)
        trainable = [one for layer in self.layers for one in layer.parameters_in_order()]
        self._gradients = Gradients(trainable) if settings.kernels.pin_gradients and device.type == "cuda" else None

    @property
    def active(self) -> tuple[str, ...]:
        """What runs, by name."""
        how = {True: "triton", False: "torch"}
        pieces = self._pieces
        return (
            f"layer: {len(self.layers)} of {self.size.num_layers}",
            f"dora: {'by hand' if self.layers[0].groups['qkv'].gain_O is not None else 'off, lora by hand'}",
            f"attention: {self._kind.__name__.lower()}",
            f"norms: {how[pieces.norms is not plain]}",
            f"geglu: {how[pieces.geglu is not plain]}",
            f"nf4: {how[pieces.rest is not plain]}",
            f"offload: {'pinned' if self._waiting.pinned_bytes else 'card'}",
            f"kept: {sum(len(names) for names in self._settings.kept.values())} outputs",
            f"span: {self._settings.kernels.span_layers}",
            f"gradients: {'pinned' if self._gradients else 'card'}",
            f"loss: {self._settings.kernels.loss}",
        )

    @property
    def pinned_bytes(self) -> int:
        return self._waiting.pinned_bytes + (self._gradients.pinned_bytes if self._gradients else 0)

    @property
    def summed(self) -> loss.Summed:
        """The loss, over the same operations."""
        return functools.partial(loss.summed_cross_entropy, ops=self._pieces.rest)

    def refresh(self) -> None:
        """After each change of the adapter's weights: DoRA's norms."""
        for layer in self.layers:
            for group in layer.groups.values():
                group.refresh()

    def gather(self) -> None:
        """Before each optimizer step: gradients that wait elsewhere come back."""
        if self._gradients:
            self._gradients.gather()

    def hidden(self, inputs: Mapping[str, Any]) -> Tensor:
        """[1, T, H] after the final norm, in the model's dtype, of one packed row: input_ids [1, T] and cu_seq_lens_q."""
        ids = inputs["input_ids"]
        if len(ids) != 1 or "cu_seq_lens_q" not in inputs:
            raise ConfigError("our decoder layer reads packed rows: input_ids [1, T] with cu_seq_lens_q")
        tokens = ids.shape[1]
        starts = [int(start) for start in inputs["cu_seq_lens_q"].tolist()]
        if filling := -tokens % ROUND:
            ids, starts = functional.pad(ids, (0, filling)), [*starts, tokens + filling]
        x = functional.embedding(ids[0], self._embedding).to(_wide(self._settings.dtype)) * math.sqrt(self.size.hidden_size)
        batch = self._batch(starts, torch.is_grad_enabled())
        if batch.trains:
            self._waiting.begin()
        take = self._gradients.take if self._gradients else _hand_over
        for layers in self._spans:
            x = Span.apply(x, layers, batch, take, *(one for layer in layers for one in layer.parameters_in_order()))
        final: Tensor = _FinalNorm.apply(x, self._final, self.size.rms_norm_eps, self._settings.dtype, self._pieces.norms)
        return final[None, :tokens]

    def _batch(self, starts: Sequence[int], trains: bool) -> Batch:
        size, device = self.size, self._embedding.device
        where = attention.documents(starts, device)
        position = torch.cat([torch.arange(end - start) for start, end in pairwise(starts)])
        position = position.to(device, _wide(self._settings.dtype), non_blocking=True)
        scale = size.query_pre_attn_scalar**-0.5

        def way(theta: float, factor: float, window: int | None) -> Way:
            half = torch.arange(0, size.head_dim, 2, device=device, dtype=position.dtype) / size.head_dim
            angle = position[:, None] * (theta**-half / factor)[None]
            return Way(self._kind(where, window, scale, self._pieces.rest), angle.cos(), angle.sin())

        near = way(size.rope_local_theta, 1.0, size.sliding_window)
        return Batch(near, way(size.rope_theta, size.rope_scaling, None), self._waiting, self._settings.kept, trains)

    def _arena_bytes(self) -> int:
        """One input a span, and what is kept in pinned memory."""
        tokens = -(-self._settings.max_tokens // ROUND) * ROUND
        each = -(-2 * tokens * self.size.hidden_size // 4096) * 4096
        return len(self._spans) * each + self._settings.kernels.keep_pinned_bytes


def install(model: Any, size: gemma3.Size, settings: Settings) -> Stack:
    """Put our layers into a model with a new adapter (a PeftModel of a Gemma3ForCausalLM), and set its magnitudes.

    Raises:
        ConfigError: a setting that our layer does not know. MachineError: no compiler for its kernels. ModelError: another model.
    """
    inner = model.get_base_model().model
    kernels, device = settings.kernels, inner.embed_tokens.weight.device
    _require(kernels, settings.dtype, device)
    if len(inner.layers) != size.num_layers:
        raise ModelError(f"the model has {len(inner.layers)} layers, its config.json {size.num_layers}")
    ours = _fused() if device.type == "cuda" else plain
    pieces = Pieces(ours if kernels.norms == "ours" else plain, ours if kernels.geglu == "ours" else plain, ours)
    layers = [_layer(number, stock, size, settings, pieces) for number, stock in enumerate(inner.layers)]
    for number, layer in enumerate(layers):
        inner.layers[number] = layer
        for group in layer.groups.values():
            group.start()
    return Stack(inner, layers, size, settings, pieces, _kind(kernels, settings.dtype, device))


def _require(kernels: Kernels, dtype: torch.dtype, device: torch.device) -> None:
    """What our layer, or this device, cannot do is said before anything is installed."""
    if kernels.dora == "stock":
        raise ConfigError('kernels.dora = "stock" has no place in our decoder layer; set kernels.layer = "stock" as well')
    if kernels.pin_gradients and device.type != "cuda":
        raise ConfigError("kernels.pin_gradients = true needs a card: a CPU has one memory")
    if device.type == "cuda" and dtype == torch.bfloat16 and torch.cuda.get_device_capability(device) < (8, 0):
        raise ConfigError('model.dtype = "bfloat16" needs compute capability 8.0 or newer; set model.dtype=float16')


def _kind(kernels: Kernels, dtype: torch.dtype, device: torch.device) -> type:
    if kernels.attention == "stock":
        return attention.Sdpa
    if device.type != "cuda":
        return attention.Plain
    if dtype == torch.float32:
        return attention.Sdpa
    return attention.Turing if dtype == torch.float16 else attention.Flash


def _fused() -> ModuleType:
    try:
        from trainer.kernels import fused
    except ImportError as error:
        raise MachineError(
            f"our kernels need triton, which this torch has not brought ({error}); run `make setup` on the GPU host"
        ) from error
    return fused


def _layer(number: int, stock: nn.Module, size: gemma3.Size, settings: Settings, pieces: Pieces) -> Layer:
    groups = {}
    for name, (part, linears) in GROUPS.items():
        modules = [getattr(getattr(stock, part), linear) for linear in linears]
        weights = [nf4.of(getattr(module, "base_layer", module).weight) for module in modules]
        groups[name] = Group(
            weights, [_adapter(module, f"{number}.{name}") for module in modules], settings.scale, settings.dtype, pieces.rest
        )
    near: Any = stock
    norms = Norms(
        near.input_layernorm.weight,
        near.self_attn.q_norm.weight,
        near.self_attn.k_norm.weight,
        near.post_attention_layernorm.weight,
        near.pre_feedforward_layernorm.weight,
        near.post_feedforward_layernorm.weight,
    )
    shape = Shape(
        (size.num_kv_heads, size.num_heads // size.num_kv_heads), size.head_dim, size.rms_norm_eps, settings.kernels.mlp_tile_tokens
    )
    return Layer(number, stock, groups, norms, shape, size.is_global(number), pieces)


def _adapter(module: Any, name: str) -> Adapter | None:
    """PEFT's tensors of one linear; None where it has no adapter."""
    if not hasattr(module, "lora_A"):
        return None
    if not isinstance(module.lora_dropout[ADAPTER], nn.Identity):
        raise ConfigError(
            "adapter.dropout must be 0 with our kernels; set adapter.dropout=0, or kernels.layer=stock and kernels.dora=stock"
        )
    magnitude = module.lora_magnitude_vector
    found = Adapter(
        module.lora_A[ADAPTER].weight, module.lora_B[ADAPTER].weight, magnitude[ADAPTER].weight if ADAPTER in magnitude else None
    )
    if any(value is not None and value.dtype not in (torch.float32, torch.float64) for value in found):
        raise ModelError(f"layer {name}: the adapter is not in float32")
    return found


def _hand_over(parameters: list[Tensor], grads: list[Tensor]) -> list[Tensor | None]:
    return list(grads)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return dtype if dtype == torch.float64 else torch.float32
