"""dora.py against autograd in float64 of the paper's formula, and at PEFT's seam against PEFT."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from trainer import gemma3
from trainer.kernels import plain
from trainer.kernels.dora import LIFT, Adapter, Group, dora
from trainer.kernels.nf4 import Nf4

SCALE, RANK, TOKENS = 0.7, 8, 19
Shapes = Sequence[tuple[int, int]]


def groups_of(size: gemma3.Size) -> dict[str, Shapes]:
    """The seven matrices, as they share their inputs."""
    linears = size.linears()
    return {
        "qkv": [linears["q_proj"], linears["k_proj"], linears["v_proj"]],
        "o": [linears["o_proj"]],
        "gate_up": [linears["gate_proj"], linears["up_proj"]],
        "down": [linears["down_proj"]],
    }


SHAPES: dict[str, Shapes] = groups_of(gemma3.SIZES["270m"]) | {"odd": [(5, 192), (301, 192)], "square": [(192, 192)]}


class Random:
    def __init__(self, seed: int) -> None:
        self._generator = torch.Generator().manual_seed(seed)

    def normal(self, *shape: int, spread: float = 1.0) -> Tensor:
        return torch.randn(shape, generator=self._generator, dtype=torch.float64) * spread

    def weight(self, out: int, wide: int) -> Nf4:
        """Table and scales of few digits, so that their product is exact in float32 and a float64 reference has the same W."""
        codes = torch.randint(0, 256, (out * wide // 2,), generator=self._generator, dtype=torch.uint8)
        table = (torch.linspace(-1, 1, 16) * 64).round() / 64
        scales = torch.randint(8, 64, (out * wide // 64,), generator=self._generator).float() / 1024
        return Nf4((out, wide), codes, scales, table, None)


class Problem(NamedTuple):
    group: Group
    adapters: list[Adapter]
    x: Tensor
    dy: Tensor


def problem(shapes: Shapes, dtype: torch.dtype, *, b: float = 0.02, tokens: int = TOKENS, rank: int = RANK) -> Problem:
    """B is not 0, and m is 20% away from n."""
    random = Random(3)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    adapters, weights = [], []
    for out, into in shapes:
        weights.append(random.weight(out, into))
        values = random.normal(rank, into, spread=into**-0.5), random.normal(out, rank, spread=b), random.normal(out)
        adapters.append(Adapter(*(value.to(wide) for value in values)))
    group = Group(weights, adapters, SCALE, dtype, plain)
    group.start()
    for adapter in adapters:
        assert adapter.m_O is not None
        adapter.m_O.mul_(1 + 0.2 * random.normal(len(adapter.m_O)).to(wide))
    group.refresh()
    x, dy = random.normal(tokens, shapes[0][1]), random.normal(tokens, sum(out for out, _ in shapes))
    return Problem(group, adapters, x.to(dtype), dy.to(dtype))


Answer = dict[str, Tensor]


def roomy(x: Tensor, more: int) -> Tensor:
    """With the adapter's columns behind it, full of what must not be read."""
    return torch.cat((x, torch.full((len(x), more), torch.nan, dtype=x.dtype)), 1)


def ours(given: Problem) -> Answer:
    group = given.group
    matrix, x, dy = group.matrix(), roomy(given.x, group.more), roomy(given.dy, group.more)
    y = group.forward(x, matrix)
    dx, gradients = group.backward(dy, x, matrix, plain.column_dot(dy, y))
    found = {"y": y, "dX": dx}
    for number, one in enumerate(gradients):
        assert one is not None and one.m_O is not None
        found |= {f"dA{number}": one.a_RI, f"dB{number}": one.b_OR, f"dm{number}": one.m_O}
    return found


def row_norms(v: Tensor) -> Tensor:
    return v.square().sum(1).sqrt()


def reference(
    given: Problem, *, scale: float = SCALE, norms: Callable[[Tensor], Tensor] = row_norms, magnitude: bool = True, shift: float = 0.0
) -> Answer:
    """y = m / |W + s B A| * (W + s B A) x in float64, the norm a constant. Keywords: what a sentinel breaks."""
    x, leaves, outs = given.x.double().clone().requires_grad_(), [], []
    for adapter, weight in zip(given.adapters, given.group.weights, strict=True):
        assert adapter.m_O is not None
        w = torch.empty(weight.shape, dtype=torch.float64)
        plain.dequantize(weight, None, w)
        a, b, m = (value.double().clone().requires_grad_() for value in (adapter.a_RI, adapter.b_OR, adapter.m_O))
        v = w + scale * (b @ a)
        gain = m / norms((w + (scale + shift) * (b @ a)).detach()) if magnitude else torch.ones_like(m) + 0 * m
        outs.append(gain * (x @ v.t()))
        leaves += [a, b, m]
    y = torch.cat(outs, 1)
    dx, *grads = torch.autograd.grad(y, [x, *leaves], given.dy.double())
    names = [f"d{name}{number}" for number in range(len(given.adapters)) for name in "ABm"]
    return {"y": y.detach(), "dX": dx, **dict(zip(names, grads, strict=True))}


def errors(found: Answer, wanted: Answer) -> dict[str, float]:
    """Of each tensor, relative to its largest value."""
    assert found.keys() == wanted.keys()
    return {name: float((found[name].double() - want).abs().max() / want.abs().max()) for name, want in wanted.items()}


def tolerance(dtype: torch.dtype) -> float:
    """Products of up to 15,360 terms: some roundings of dtype, in 16 bits of the operands only, as sums are wider."""
    return {torch.float64: 64, torch.float32: 16, torch.float16: 2}[dtype] * torch.finfo(dtype).eps


DTYPES = pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16], ids=str)


@DTYPES
@pytest.mark.parametrize("name", SHAPES)
def test_outputs_and_all_gradients_are_those_of_the_formula(name: str, dtype: torch.dtype) -> None:
    given = problem(SHAPES[name], dtype)
    assert max(errors(ours(given), reference(given)).values()) <= tolerance(dtype)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["qkv", "o", "gate_up", "down"])
def test_shapes_of_12b_at_rank_64(name: str) -> None:
    given = problem(groups_of(gemma3.SIZES["12b"])[name], torch.float32, tokens=4, rank=64)
    assert max(errors(ours(given), reference(given)).values()) <= tolerance(torch.float32)


@DTYPES
def test_a_formula_without_one_of_its_parts_is_far_away(dtype: torch.dtype) -> None:
    """Sentinels: each is ten tolerances off where it matters."""
    given, bound = problem(SHAPES["square"], dtype, b=0.1), 10 * tolerance(dtype)
    found = ours(given)
    assert max(errors(found, reference(given)).values()) <= tolerance(dtype)
    without_scale = errors(found, reference(given, scale=1.0))
    assert min(without_scale[name] for name in ("y", "dX", "dA0", "dB0")) > bound
    without_magnitude = errors(found, {**reference(given, magnitude=False), "dm0": torch.ones(192)})
    assert min(without_magnitude[name] for name in ("y", "dX", "dA0", "dB0")) > bound
    columns = errors(found, reference(given, norms=lambda v: v.norm(dim=0)))
    assert min(columns.values()) > bound
    other_adapter = errors(found, reference(given, shift=0.5))
    assert min(other_adapter.values()) > bound


def test_a_group_may_hold_linears_without_adapter_and_plain_lora() -> None:
    """k has none, v's is LoRA: their gains are 1."""
    random = Random(5)
    weights = [random.weight(out, 128) for out in (96, 64, 32)]
    with_m = Adapter(random.normal(4, 128, spread=0.1), random.normal(96, 4), random.normal(96).abs() + 1)
    lora = Adapter(random.normal(6, 128, spread=0.1), random.normal(32, 6), None)
    group = Group(weights, [with_m, None, lora], SCALE, torch.float64, plain)
    group.refresh()
    x, dy = random.normal(7, 128), random.normal(7, 192)
    matrix, roomy_x, roomy_dy = group.matrix(), roomy(x, group.more), roomy(dy, group.more)
    y = group.forward(roomy_x, matrix)
    dx, gradients = group.backward(roomy_dy, roomy_x, matrix, plain.column_dot(roomy_dy, y))
    assert gradients[1] is None and gradients[2] is not None and gradients[2].m_O is None
    dense = torch.empty(192, 128, dtype=torch.float64)
    for weight, part in zip(weights, group.slices, strict=True):
        plain.dequantize(weight, None, dense[part])
    v_q = dense[:96] + SCALE * with_m.b_OR @ with_m.a_RI
    assert with_m.m_O is not None
    full = torch.cat([(with_m.m_O / v_q.norm(dim=1))[:, None] * v_q, dense[96:160], dense[160:] + SCALE * lora.b_OR @ lora.a_RI])
    torch.testing.assert_close(y, x @ full.t(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(dx, dy @ full, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(gradients[2].b_OR, SCALE * dy[:, 160:].t() @ (x @ lora.a_RI.t()), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["qkv", "odd"])
def test_a_new_adapter_changes_no_bit(name: str, dtype: torch.dtype) -> None:
    """B = 0 and m from the routine that computes n: g is 1, and y is QLoRA's."""
    given = problem(SHAPES[name], dtype, b=0.0)
    group = given.group
    group.start()
    assert group.gain_O is not None and torch.equal(group.gain_O, torch.ones_like(group.gain_O))
    w = torch.cat([torch.empty(weight.shape, dtype=dtype) for weight in group.weights])
    for weight, part in zip(group.weights, group.slices, strict=True):
        plain.dequantize(weight, None, w[part])
    matrix = group.matrix()
    assert torch.equal(matrix[: group.out, : group.wide], w)
    y = group.forward(roomy(given.x, group.more), matrix)
    lora = Group(group.weights, [Adapter(one.a_RI, one.b_OR, None) for one in given.adapters], SCALE, dtype, plain)
    lora.refresh()
    assert lora.gain_O is None and torch.equal(y, lora.forward(roomy(given.x, group.more), lora.matrix()))
    # The adapter's columns add zeros, but a BLAS may then sum in blocks of other lengths.
    base = torch.mm(given.x, w.t())
    torch.testing.assert_close(y, base, rtol=0, atol=8 * float(base.abs().max()) * torch.finfo(dtype).eps)


def test_bound_is_the_largest_row_of_what_y_is_the_product_with() -> None:
    given = problem(SHAPES["odd"], torch.float64)
    largest = torch.cat([adapter.m_O.abs() for adapter in given.adapters if adapter.m_O is not None]).max()
    torch.testing.assert_close(given.group.bound, largest, rtol=1e-12, atol=0)


def optimizer_step(given: Problem, optimizer: Callable[[list[Tensor]], torch.optim.Optimizer]) -> None:
    found = ours(given)
    parameters = []
    for number, adapter in enumerate(given.adapters):
        for name, value in zip(("dA", "dB", "dm"), adapter, strict=True):
            assert value is not None
            value.grad = found[f"{name}{number}"].to(value.dtype)
            parameters.append(value)
    optimizer(parameters).step()


def test_norms_are_stale_until_refreshed_after_an_optimizer_step() -> None:
    given = problem(SHAPES["odd"], torch.float32)
    optimizer_step(given, lambda parameters: torch.optim.AdamW(parameters, lr=0.02))
    assert min(errors(ours(given), reference(given)).values()) > 10 * tolerance(torch.float32)
    given.group.refresh()
    assert max(errors(ours(given), reference(given)).values()) <= tolerance(torch.float32)


@pytest.mark.gpu
def test_norms_are_refreshed_after_the_8_bit_optimizer() -> None:
    """Compared on the CPU; only the step is the card's."""
    bitsandbytes = pytest.importorskip("bitsandbytes")
    given = problem(SHAPES["down"], torch.float32)

    def make(parameters: list[Tensor]) -> Any:
        there = [torch.nn.Parameter(value.cuda()) for value in parameters]
        for mine, original in zip(there, parameters, strict=True):
            assert original.grad is not None
            mine.grad = original.grad.cuda()
        inner = bitsandbytes.optim.AdamW8bit(there, lr=0.02)
        inner.step()
        for mine, original in zip(there, parameters, strict=True):
            original.copy_(mine.detach().cpu())
        return torch.optim.SGD(parameters, lr=0.0)

    optimizer_step(given, make)
    assert min(errors(ours(given), reference(given)).values()) > 10 * tolerance(torch.float32)
    given.group.refresh()
    assert max(errors(ours(given), reference(given)).values()) <= tolerance(torch.float32)


def test_a_small_b_keeps_its_digits_in_float16() -> None:
    """At 1e-5, an optimizer's first step, float16 itself has 8 bits."""
    given = problem([(64, 128)], torch.float16, b=1e-5)
    share = given.group.matrix()[:64, 128:].double() / (LIFT * SCALE)
    adapter, gain = given.adapters[0], given.group.gain_O
    assert gain is not None
    wanted = adapter.b_OR.double() * gain.double()[:, None]
    assert float((share - wanted).norm() / wanted.norm()) < 2**-11
    assert float((wanted.half().double() - wanted).norm() / wanted.norm()) > 2**-10  # sentinel


def test_gradients_of_one_in_ten_million_are_not_lost_behind_a_loss_scale() -> None:
    """dY near 1e-7 is two steps above float16's smallest number, and P = s dY (g B) below it; times 2^16 they are far inside."""
    given, scale = problem(SHAPES["odd"], torch.float16), 2.0**16
    wanted = reference(given._replace(dy=given.dy.double() * 1e-7))
    scaled = ours(given._replace(dy=(given.dy.double() * 1e-7 * scale).half()))
    found = {name: value.double() / (1 if name == "y" else scale) for name, value in scaled.items()}
    assert max(errors(found, wanted).values()) <= 2 * tolerance(torch.float16)
    plainly = errors(ours(given._replace(dy=(given.dy.double() * 1e-7).half())), wanted)
    assert plainly["dA0"] > 0.1, "sentinel: without a scale it is lost"


# --- at PEFT's seam


def arguments(dtype: torch.dtype = torch.float32, wide: torch.dtype = torch.float32) -> tuple[Any, ...]:
    random = Random(8)
    base, x = random.normal(2, 5, 48).to(dtype), random.normal(2, 5, 64).to(dtype)
    trainable = [random.normal(4, 64, spread=0.1).to(wide), random.normal(48, 4).to(wide), (random.normal(48).abs() + 1).to(wide)]
    return (
        base.requires_grad_(),
        x.requires_grad_(),
        *(one.requires_grad_() for one in trainable),
        (random.normal(48).abs() + 1).to(wide),
        SCALE,
    )


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # opcheck's own
@pytest.mark.parametrize(
    ("dtype", "wide"), [(torch.float32, torch.float32), (torch.float64, torch.float64), (torch.bfloat16, torch.float32)]
)
def test_the_custom_op_is_registered_rightly(dtype: torch.dtype, wide: torch.dtype) -> None:
    torch.library.opcheck(dora, arguments(dtype, wide))


def test_the_custom_ops_gradients_are_those_of_the_formula() -> None:
    args = arguments(torch.float64, torch.float64)
    base, x, a, b, m, n, scale = args
    grad = Random(9).normal(2, 5, 48)
    wanted = torch.autograd.grad((m / n) * (base + scale * (x @ a.t()) @ b.t()), args[:5], grad)
    found = torch.autograd.grad(dora(*args), args[:5], grad)
    for have, want in zip(found, wanted, strict=True):
        torch.testing.assert_close(have, want, rtol=1e-11, atol=1e-11)


def test_the_custom_op_is_what_peft_computes() -> None:
    peft = pytest.importorskip("peft")
    torch.manual_seed(1)
    base = torch.nn.Linear(64, 48, bias=False)
    holder = torch.nn.Sequential(base)
    settings = peft.LoraConfig(r=4, lora_alpha=3, use_dora=True, use_rslora=True, target_modules=["0"])
    linear = peft.get_peft_model(holder, settings).base_model.model[0]
    a, b, m = linear.lora_A["default"].weight, linear.lora_B["default"].weight, linear.lora_magnitude_vector["default"].weight
    torch.nn.init.normal_(b, std=0.1)
    m.data.mul_(1 + 0.2 * torch.randn(48))
    scale, x = linear.scaling["default"], torch.randn(7, 64, requires_grad=True)
    n = (base.weight + scale * b @ a).norm(dim=1).detach()
    grad = torch.randn(7, 48)
    mine, theirs = dora(base(x), x, a, b, m, n, scale), linear(x)
    torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)
    for have, want in zip(torch.autograd.grad(mine, (x, a, b, m), grad), torch.autograd.grad(theirs, (x, a, b, m), grad), strict=True):
        torch.testing.assert_close(have, want, rtol=1e-4, atol=1e-4)


def test_a_compiler_leaves_the_op_whole_forward_and_backward() -> None:
    from functorch.compile import make_boxed_func
    from torch._dynamo.backends.common import aot_autograd

    seen: list[str] = []

    def count(graph: torch.fx.GraphModule, _: Any) -> Any:
        seen.extend(str(node.target) for node in graph.graph.nodes if "trinity" in str(node.target))
        return make_boxed_func(graph.forward)

    args = arguments()

    def twice(base: Tensor, x: Tensor, *rest: Any) -> Tensor:
        return torch.tanh(dora(dora(base, x, *rest).sin(), x, *rest))

    backend = aot_autograd(fw_compiler=count, bw_compiler=count)
    out = torch.compile(twice, backend=backend, fullgraph=True, dynamic=False)(*args)
    found = torch.autograd.grad(out.sum(), args[:5])
    assert sorted(seen) == ["trinity.dora.default"] * 2 + ["trinity.dora_backward.default"] * 2
    plainly = twice(*args)
    torch.testing.assert_close(out, plainly)
    for have, want in zip(found, torch.autograd.grad(plainly.sum(), args[:5]), strict=True):
        torch.testing.assert_close(have, want)
