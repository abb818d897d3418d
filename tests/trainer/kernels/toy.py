"""A small text model with random NF4 weights and an adapter: as our Stack, and as transformers' own model with the adapter merged in."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate
from types import ModuleType, SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from trainer import gemma3
from trainer.config import Kernels
from trainer.kernels import attention, plain
from trainer.kernels.dora import Adapter, Group
from trainer.kernels.layer import Layer, Norms, Pieces, Shape
from trainer.kernels.nf4 import Nf4
from trainer.kernels.stack import GROUPS, Settings, Stack

SCALE, RANK, VOCABULARY = 0.7, 4, 96


def reduced(name: str, hidden: int = 128, inner: int = 192) -> gemma3.Size:
    """That size's heads, rope and norms at a small width: a local and a global layer, a window of 16."""
    return replace(
        gemma3.SIZES[name],
        vocab_size=VOCABULARY,
        hidden_size=hidden,
        intermediate_size=inner,
        num_layers=2,
        sliding_pattern=2,
        sliding_window=16,
    )


class Loud(NamedTuple):
    """Factors on the embedding and on the norm before the MLP: what makes a residual or gate * up large."""

    embedding: float = 1.0
    mlp: float = 1.0


class Toy:
    def __init__(self, size: gemma3.Size, dtype: torch.dtype, device: str = "cpu", loud: Loud = Loud()) -> None:  # noqa: B008 - a constant
        self.size, self.dtype, self.device = size, dtype, device
        self._generator = torch.Generator().manual_seed(11)
        self.wide = torch.float64 if dtype == torch.float64 else torch.float32
        embedding = self._normal(size.vocab_size, size.hidden_size, spread=size.hidden_size**-0.5, dtype=self.wide) * loud.embedding
        self.embedding = embedding.clamp(-6e4, 6e4).to(dtype)  # what float16 holds
        self.norms = [{name: self._normal(width, spread=0.2) for name, width in size.norms().items()} for _ in range(size.num_layers)]
        for norms in self.norms:
            norms["pre_feedforward_layernorm"] = (1 + norms["pre_feedforward_layernorm"]) * loud.mlp - 1
        self.final = self._normal(size.hidden_size, spread=0.2)
        self.weights = [{name: self._weight(*shape) for name, shape in size.linears().items()} for _ in range(size.num_layers)]
        self.adapters = [{name: self._adapter(*shape) for name, shape in size.linears().items()} for _ in range(size.num_layers)]

    def _normal(self, *shape: int, spread: float = 1.0, dtype: torch.dtype | None = None) -> Tensor:
        made = torch.randn(shape, generator=self._generator, dtype=torch.float64) * spread
        return made.to(self.device, dtype or self.dtype)

    def _weight(self, out: int, wide: int) -> Nf4:
        """Of few digits, so that table times scale is exact in float32."""
        codes = torch.randint(0, 256, (out * wide // 2,), generator=self._generator, dtype=torch.uint8)
        table = (torch.linspace(-1, 1, 16) * 64).round() / 64
        scales = torch.randint(32, 64, (out * wide // 64,), generator=self._generator).float() / 2 ** (5 + round(math.log2(wide) / 2))
        return Nf4((out, wide), codes.to(self.device), scales.to(self.device), table.to(self.device), None)

    def _adapter(self, out: int, wide: int) -> Adapter:
        a, b = self._normal(RANK, wide, spread=wide**-0.5, dtype=self.wide), self._normal(out, RANK, spread=0.1, dtype=self.wide)
        return Adapter(a.requires_grad_(), b.requires_grad_(), torch.ones(out, dtype=self.wide, device=self.device).requires_grad_())

    def stack(
        self,
        *,
        ops: ModuleType = plain,
        kind: type = attention.Plain,
        kept: Any = None,
        size: gemma3.Size | None = None,
        max_tokens: int = 256,
        **kernels: Any,
    ) -> Stack:
        """Ours; m is set 20% away from n."""
        size = size or self.size
        settings = Settings(Kernels(layer="ours", **kernels), self.dtype, SCALE, max_tokens, kept or {})
        pieces = Pieces(ops, ops, ops)
        layers = [self._layer(number, size, settings, pieces) for number in range(size.num_layers)]
        generator = torch.Generator().manual_seed(12)
        for layer in layers:
            for group in layer.groups.values():
                group.start()
                for adapter in group.adapters:
                    assert adapter is not None and adapter.m_O is not None
                    adapter.m_O.data *= 1 + 0.2 * torch.randn(len(adapter.m_O), generator=generator).to(self.device, self.wide)
                group.refresh()
        inner = SimpleNamespace(embed_tokens=SimpleNamespace(weight=self.embedding), norm=SimpleNamespace(weight=self.final))
        return Stack(inner, layers, size, settings, pieces, kind)

    def _layer(self, number: int, size: gemma3.Size, settings: Settings, pieces: Pieces) -> Layer:
        groups = {}
        for name, (_, linears) in GROUPS.items():
            weights, adapters = [self.weights[number][linear] for linear in linears], [self.adapters[number][linear] for linear in linears]
            groups[name] = Group(weights, adapters, SCALE, self.dtype, pieces.rest)
        norms = Norms(*(self.norms[number][name] for name in _NORMS))
        heads = size.num_kv_heads, size.num_heads // size.num_kv_heads
        shape = Shape(heads, size.head_dim, size.rms_norm_eps, settings.kernels.mlp_tile_tokens)
        return Layer(number, nn.Module(), groups, norms, shape, size.is_global(number), pieces)

    def parameters(self) -> dict[str, Tensor]:
        return {
            f"{number}.{name}.{part}": value
            for number, adapters in enumerate(self.adapters)
            for name, adapter in adapters.items()
            for part, value in zip("ABm", adapter, strict=True)
            if value is not None
        }


_NORMS = (
    "input_layernorm",
    "self_attn.q_norm",
    "self_attn.k_norm",
    "post_attention_layernorm",
    "pre_feedforward_layernorm",
    "post_feedforward_layernorm",
)


class Answer(NamedTuple):
    hidden: Tensor
    """[T, H]."""
    gradients: dict[str, Tensor]


def row(documents: Sequence[Sequence[int]], device: str = "cpu") -> dict[str, Tensor]:
    ids = [token for one in documents for token in one]
    ends = torch.tensor([0, *accumulate(len(one) for one in documents)], dtype=torch.int32)
    return {"input_ids": torch.tensor([ids], device=device), "cu_seq_lens_q": ends.to(device)}


def of_ours(toy: Toy, model: Stack, documents: Sequence[Sequence[int]], grad: Tensor) -> Answer:
    """grad: of the hidden states [T, H]."""
    hidden = model.hidden(row(documents, toy.device))[0]
    parameters = toy.parameters()
    found = torch.autograd.grad(hidden, list(parameters.values()), grad.to(hidden))
    return Answer(hidden.detach(), dict(zip(parameters, found, strict=True)))


def of_transformers(toy: Toy, documents: Sequence[Sequence[int]], grad: Tensor, size: gemma3.Size | None = None) -> Answer:
    """Gemma3TextModel with W = m / n (W + s B A), document after document; float64 but for its norms and rotations, which are float32."""
    from transformers import Gemma3TextConfig
    from transformers.models.gemma3.modeling_gemma3 import Gemma3TextModel

    config = Gemma3TextConfig(**(size or toy.size).to_config("float64"), attn_implementation="eager")
    model = Gemma3TextModel(config).double()
    leaves = {name: value.detach().double().cpu().requires_grad_() for name, value in toy.parameters().items()}
    state = {"embed_tokens.weight": toy.embedding.double().cpu(), "norm.weight": toy.final.double().cpu()}
    for number, weights in enumerate(toy.weights):
        for name, norm in toy.norms[number].items():
            state[f"layers.{number}.{name}.weight"] = norm.double().cpu()
        for name, weight in weights.items():
            w = torch.empty(weight.shape, dtype=torch.float64, device=toy.device)
            plain.dequantize(weight, None, w)
            a, b, m = (leaves[f"{number}.{name}.{part}"] for part in "ABm")
            v = w.cpu() + SCALE * b @ a
            state[gemma3.linear_name(number, name).removeprefix("model.")] = (m / v.detach().norm(dim=1))[:, None] * v
    outs = [
        torch.func.functional_call(model, state, kwargs={"input_ids": torch.tensor([ids]), "use_cache": False}).last_hidden_state[0]
        for ids in documents
    ]
    hidden = torch.cat(outs)
    found = torch.autograd.grad(hidden, list(leaves.values()), grad.double().cpu())
    return Answer(hidden.detach(), dict(zip(leaves, found, strict=True)))


def worst(found: Answer, wanted: Answer) -> float:
    """Largest relative L2 error of the hidden states and of each gradient."""
    assert found.gradients.keys() == wanted.gradients.keys()
    pairs = [(found.hidden, wanted.hidden), *((found.gradients[name], want) for name, want in wanted.gradients.items())]
    return max(
        float(torch.nan_to_num((have.double().cpu() - want.double().cpu()).norm() / want.double().cpu().norm(), nan=math.inf))
        for have, want in pairs
    )


def documents(lengths: Sequence[int]) -> list[list[int]]:
    generator = torch.Generator().manual_seed(13)
    return [torch.randint(0, VOCABULARY, (length,), generator=generator).tolist() for length in lengths]


def gradient(size: gemma3.Size, lengths: Sequence[int]) -> Tensor:
    return torch.randn(sum(lengths), size.hidden_size, generator=torch.Generator().manual_seed(14), dtype=torch.float64)
