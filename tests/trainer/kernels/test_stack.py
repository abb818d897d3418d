"""stack.py: the tiny model with our layers against PEFT's DoRA on transformers' layers, from token ids to loss and gradients."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import pytest
import torch

pytest.importorskip("peft")
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tests.trainer.kernels.toy import Answer, Loud, Toy, documents, gradient, of_ours, reduced, row, worst
from trainer import gemma3
from trainer.backends import hub
from trainer.config import Config
from trainer.errors import ConfigError, ModelError
from trainer.kernels import attention, loss, stack
from trainer.planner import keep
from trainer.training import model as models
from trainer.training.batches import Row

LENGTHS = (90, 40, 64)
EVERYTHING = {"down": "card", "o": "card", "qkv": "card", "gate_up": "card", "attention": "card"}
KEPT: dict[str, dict[int, dict[str, str]]] = {
    "nothing": {},
    "down": {0: {"down": "card"}, 1: {"down": "card"}},
    "some": {0: {"down": "card", "qkv": "card"}, 1: {"o": "card", "gate_up": "card", "attention": "card"}},
    "o": {0: {"o": "card"}},
    "gate_up": {0: {"gate_up": "card"}, 1: {"gate_up": "card", "down": "card"}},
    "attention": {0: {"attention": "card"}, 1: {"attention": "card", "qkv": "card"}},
    "everything": {0: EVERYTHING, 1: EVERYTHING},
}


class Tiny:
    """The tiny model in float32, with a new adapter."""

    def __init__(self, cfg: Config) -> None:
        self.cfg, self.size, self._state = cfg, hub.size(cfg.model, cfg.paths.cache), models.nf4(cfg)

    def model(self) -> Any:
        return models.with_new_adapter(self.cfg, models.base(self.cfg, self._state))

    def stack(self, model: Any, kept: Any = None, **kernels: Any) -> stack.Stack:
        chosen = self.cfg.kernels.model_copy(update={"layer": "ours", **kernels})
        return stack.install(model, self.size, stack.Settings(chosen, torch.float32, self.cfg.adapter.scale, 256, kept or {}))


def train(model: Any, installed: stack.Stack | None = None) -> None:
    """The same adapter each time, far from a new one: B is not 0, and m is 20% away from what it was."""
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator) if parameter.requires_grad else torch.zeros(1)
        if "lora_B" in name:
            parameter.data.copy_(0.02 * noise)
        if "magnitude" in name:
            parameter.data.mul_(1 + 0.2 * noise.to(parameter.device))
    if installed:
        installed.refresh()


def rows(lengths: Sequence[int] = LENGTHS) -> list[Row]:
    generator = torch.Generator().manual_seed(3)
    made = [torch.randint(5, 600, (length,), generator=generator).tolist() for length in lengths]
    return [Row(ids, [-100, -100, *ids[2:]], (len(ids),)) for ids in made]


class Found(NamedTuple):
    loss: float
    gradients: dict[str, Tensor]


def step(model: Any, batch: dict[str, Any], hidden: loss.Hidden) -> Found:
    """Loss and all gradients; .grad is left alone."""
    parameters = {name: one for name, one in model.named_parameters() if one.requires_grad}
    total = loss.of_batch(batch, hidden, model.get_output_embeddings().weight)
    return Found(total.item(), dict(zip(parameters, torch.autograd.grad(total, list(parameters.values())), strict=True)))


def error(found: Found, wanted: Found) -> float:
    """The worst of loss and gradients, relative."""
    assert found.gradients.keys() == wanted.gradients.keys() and len(wanted.gradients) == 2 * 7 * 3
    worst = max(float((found.gradients[name] - want).norm() / want.norm()) for name, want in wanted.gradients.items())
    return max(worst, abs(found.loss / wanted.loss - 1))


@pytest.fixture(scope="module")
def tiny(tiny_config: Callable[..., Config]) -> Tiny:
    return Tiny(tiny_config("model.dtype=float32", "adapter.rank=8"))


@pytest.fixture(scope="module")
def by_peft(tiny: Tiny) -> Found:
    """The oracle: PEFT's DoRA, transformers' layers, a padded batch."""
    model = tiny.model()
    train(model)
    return step(model, models.tensors(rows()), models.hidden_states(model))


@pytest.fixture(scope="module")
def ours(tiny: Tiny) -> tuple[Any, stack.Stack]:
    model = tiny.model()
    installed = tiny.stack(model)
    train(model, installed)
    return model, installed


def test_loss_and_every_gradient_are_pefts(ours: tuple[Any, stack.Stack], by_peft: Found) -> None:
    model, installed = ours
    assert error(step(model, models.packed_tensors(rows()), installed.hidden), by_peft) <= 1e-5


@pytest.mark.parametrize(
    ("span", "tile", "kept"),
    [
        (2, 4096, "nothing"),
        (1, 128, "nothing"),
        (2, 128, "some"),
        *((1, 4096, kept) for kept in KEPT if kept != "nothing"),
        (1, 128, "everything"),
    ],
)
def test_spans_tiles_and_kept_outputs_change_no_result(tiny: Tiny, by_peft: Found, span: int, tile: int, kept: str) -> None:
    model = tiny.model()
    installed = tiny.stack(model, KEPT[kept], span_layers=span, mlp_tile_tokens=tile)
    train(model, installed)
    for _ in range(2):  # a second step finds nothing left over of the first
        assert error(step(model, models.packed_tensors(rows()), installed.hidden), by_peft) <= 1e-5


@pytest.mark.parametrize("piece", ["attention", "norms", "geglu"])
def test_each_piece_may_be_stock(tiny: Tiny, by_peft: Found, piece: str) -> None:
    model = tiny.model()
    installed = tiny.stack(model, **{piece: "stock"})
    train(model, installed)
    assert error(step(model, models.packed_tensors(rows()), installed.hidden), by_peft) <= 1e-5
    if piece == "attention":
        assert "attention: sdpa" in installed.active


def test_lost_boundaries_and_a_lost_window_are_seen(ours: tuple[Any, stack.Stack], by_peft: Found) -> None:
    """Sentinels: one document of all, and a window wider by one, in a model whose window is 64."""
    model, installed = ours
    batch = models.packed_tensors(rows())
    joined = {**batch, "cu_seq_lens_q": batch["cu_seq_lens_q"][[0, -1]]}
    assert error(step(model, joined, installed.hidden), by_peft) > 1e-3
    assert installed.size.sliding_window < max(LENGTHS)
    size = installed.size
    installed.size = replace(size, sliding_window=size.sliding_window + 1)
    assert error(step(model, batch, installed.hidden), by_peft) > 1e-4
    installed.size = size


def test_a_packed_batch_is_its_records_one_by_one(ours: tuple[Any, stack.Stack]) -> None:
    model, installed = ours
    together = step(model, models.packed_tensors(rows()), installed.hidden)
    alone = [step(model, models.packed_tensors([one]), installed.hidden) for one in rows()]
    summed = {name: torch.stack([one.gradients[name] for one in alone]).sum(0) for name in together.gradients}
    assert error(together, Found(sum(one.loss for one in alone), summed)) <= 1e-5


# --- what ran


@pytest.mark.parametrize(
    ("span", "kept", "linears", "attentions"),
    [
        (1, "nothing", [14, 14], [2, 2]),
        (2, "nothing", [21, 14], [3, 2]),  # the first layer of a span runs once more, to make the second one's input
        (1, "down", [13, 13], [2, 2]),
        (1, "everything", [7, 7], [1, 1]),
    ],
)
def test_counters_prove_that_every_linear_and_attention_ran_and_was_run_again(
    tiny: Tiny, span: int, kept: str, linears: list[int], attentions: list[int]
) -> None:
    model = tiny.model()
    installed = tiny.stack(model, KEPT[kept], span_layers=span)
    hidden = installed.hidden(loss.inputs(models.packed_tensors(rows())))
    for layer in installed.layers:
        assert layer.counts == {"linear forward": 7, "linear backward": 0, "attention forward": 1, "attention backward": 0}
    hidden.sum().backward()  # type: ignore[no-untyped-call]
    assert [layer.counts["linear forward"] for layer in installed.layers] == linears
    assert [layer.counts["attention forward"] for layer in installed.layers] == attentions
    assert all(layer.counts["linear backward"] == 7 and layer.counts["attention backward"] == 1 for layer in installed.layers)


@pytest.mark.parametrize("names", [("down",), ("o",), ("down", "o"), ("o", "attention"), ("gate_up", "down")], ids=str)
def test_an_output_kept_under_another_c_than_the_recomputes_changes_no_gradient(names: tuple[str, ...]) -> None:
    """A row whose norm lies at a power of two may be scaled otherwise the second time; here a larger bound makes every one so."""
    size, lengths = reduced("12b"), (40, 24)
    toy = Toy(size, torch.float64, loud=Loud(2.2e5, 300.0))
    wanted = of_ours(toy, toy.stack(), documents(lengths), gradient(size, lengths))
    model = toy.stack(kept={layer: dict.fromkeys(names, "card") for layer in range(2)})
    hidden = model.hidden(row(documents(lengths)))[0]
    for layer in model.layers:
        for name in ("down", "o"):
            layer.groups[name].bound = layer.groups[name].bound * 4
    parameters = toy.parameters()
    found = torch.autograd.grad(hidden, list(parameters.values()), gradient(size, lengths))
    assert worst(Answer(hidden.detach(), dict(zip(parameters, found, strict=True))), wanted) <= 1e-9


def test_the_plan_fills_rows_as_the_stack_does() -> None:
    assert keep.ROUND_TOKENS == stack.ROUND


def test_active_names_every_piece(ours: tuple[Any, stack.Stack]) -> None:
    active = ours[1].active
    assert active[0] == "layer: 2 of 2" and "dora: by hand" in active and "attention: plain" in active
    assert [name.split(":")[0] for name in active] == [
        "layer",
        "dora",
        "attention",
        "norms",
        "geglu",
        "nf4",
        "offload",
        "kept",
        "span",
        "gradients",
        "loss",
    ]
    assert ours[1].pinned_bytes == 0


# --- a new adapter, a step, a resume


def test_a_new_adapter_computes_what_the_base_computes(tiny: Tiny) -> None:
    """B = 0: g is 1 in every row, and hidden states are the base's."""
    model = tiny.model()
    batch = models.packed_tensors(rows((90,)))
    with torch.no_grad(), model.disable_adapter():
        base = models.hidden_states(model)({name: batch[name] for name in ("input_ids", "position_ids")})
    installed = tiny.stack(model)
    for layer in installed.layers:
        for group in layer.groups.values():
            assert group.gain_O is not None and torch.equal(group.gain_O, torch.ones_like(group.gain_O))
    with torch.no_grad():
        found = installed.hidden(loss.inputs(batch))
    assert float((found - base).norm() / base.norm()) <= 1e-5


def test_a_forgotten_refresh_after_an_optimizer_step_is_seen(tiny: Tiny) -> None:
    """PEFT on the same weights is the judge: ten tolerances off before, as exact as ever after."""
    ours, peft = tiny.model(), tiny.model()
    installed = tiny.stack(ours)
    train(ours, installed)
    batch = models.packed_tensors(rows())
    found = step(ours, batch, installed.hidden)
    trainable = {name: one for name, one in ours.named_parameters() if one.requires_grad}
    for name, parameter in trainable.items():
        parameter.grad = found.gradients[name]
    torch.optim.AdamW(list(trainable.values()), lr=0.01).step()
    for name, parameter in peft.named_parameters():
        if name in trainable:
            parameter.data.copy_(trainable[name].data)
    wanted = step(peft, models.tensors(rows()), models.hidden_states(peft))
    assert error(step(ours, batch, installed.hidden), wanted) > 1e-4
    installed.refresh()
    assert error(step(ours, batch, installed.hidden), wanted) <= 1e-5


def test_hidden_states_are_the_same_bits_after_a_resume_and_without_gradients(ours: tuple[Any, stack.Stack], tiny: Tiny) -> None:
    model, installed = ours
    inputs = loss.inputs(models.packed_tensors(rows()))
    before = installed.hidden(inputs)
    with torch.no_grad():
        assert torch.equal(installed.hidden(inputs), before), "validation computes what training does"
    resumed = tiny.model()
    again = tiny.stack(resumed)
    weights = {name: one.data for name, one in model.named_parameters() if one.requires_grad}
    for name, parameter in resumed.named_parameters():
        if name in weights:
            parameter.data.copy_(weights[name])
    assert not torch.equal(again.hidden(inputs), before), "sentinel: norms are still those of the new adapter"
    again.refresh()
    assert torch.equal(again.hidden(inputs), before)


def test_parameters_keep_the_names_that_peft_saves(ours: tuple[Any, stack.Stack], tiny: Tiny) -> None:
    assert [name for name, _ in ours[0].named_parameters()] == [name for name, _ in tiny.model().named_parameters()]


# --- what is refused


def test_rows_that_are_not_packed_are_refused(ours: tuple[Any, stack.Stack]) -> None:
    batch = models.tensors(rows())
    with pytest.raises(ConfigError, match="packed"):
        ours[1].hidden(loss.inputs(batch))


def test_a_model_may_not_run_by_its_own_forward(ours: tuple[Any, stack.Stack]) -> None:
    with pytest.raises(RuntimeError, match=r"Stack\.hidden"):
        ours[0](input_ids=torch.tensor([[5, 6, 7]]))


def test_what_our_layer_does_not_know_is_an_error(tiny: Tiny, tiny_config: Callable[..., Config]) -> None:
    model = tiny.model()
    with pytest.raises(ConfigError, match=r"kernels\.dora"):
        tiny.stack(model, dora="stock")
    with pytest.raises(ModelError, match="2 layers"):
        stack.install(model, replace(tiny.size, num_layers=3), stack.Settings(tiny.cfg.kernels, torch.float32, 1.0, 256, {}))
    cfg = tiny_config("model.dtype=float32", "adapter.rank=8", "adapter.dropout=0.1")
    with pytest.raises(ConfigError, match="dropout"):
        tiny.stack(models.with_new_adapter(cfg, models.base(cfg, models.nf4(cfg))))


# --- on a card


class Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Shapes and dtypes of all that any operation of torch returns."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.seen: set[tuple[tuple[int, ...], torch.dtype]] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for value in out if isinstance(out, tuple | list) else [out]:
            if isinstance(value, Tensor):
                self.seen.add((tuple(value.shape), value.dtype))
        return out


def forbidden(seen: set[tuple[tuple[int, ...], torch.dtype]], size: gemma3.Size, tokens: int) -> list[tuple[tuple[int, ...], torch.dtype]]:
    """T x T (or G T x T), d_in x d_in, and a matrix of weights in more than 16 bits."""
    linears = set(size.linears().values())
    found = []
    for shape, dtype in seen:
        pair = shape[-2:]
        square = (len(pair) == 2 and pair[1] == tokens and pair[0] % tokens == 0) or pair in {
            (tokens, tokens),
            *((wide, wide) for _, wide in linears),
        }
        weights = {(out, wide) for out, wide in linears} | {(wide, out) for out, wide in linears}
        if square or (dtype.itemsize > 2 and pair in weights):
            found.append((shape, dtype))
    return found


@pytest.mark.gpu
def test_forward_and_backward_of_layers_make_no_square_and_no_wide_weight() -> None:
    """Every tensor that torch makes on the way; Triton's outputs are among them, as fused.py asks torch for them."""
    from trainer.kernels import fused

    tokens, size = 2112, reduced("4b", hidden=640, inner=1280)
    toy = Toy(size, torch.float16, "cuda")
    model = toy.stack(ops=fused, kind=attention.Turing, max_tokens=tokens)
    with Watch() as watch:
        of_ours(toy, model, documents((tokens,)), gradient(size, (tokens,)))
    assert ((tokens, size.hidden_size), torch.float32) in watch.seen, "sentinel: the residual was seen"
    assert forbidden(watch.seen, size, tokens) == []


def test_such_tensors_would_be_seen() -> None:
    """Sentinel: torch's dense way on the CPU makes all three."""
    tokens, size = 192, reduced("4b")
    toy = Toy(size, torch.float32)
    model = toy.stack()
    with Watch() as watch:
        of_ours(toy, model, documents((tokens,)), gradient(size, (tokens,)))
        torch.eye(size.hidden_size) @ torch.ones(size.hidden_size, 3)
    shapes = {shape[-2:] for shape, _ in forbidden(watch.seen, size, tokens)}
    assert {(size.hidden_size, size.hidden_size), (size.intermediate_size, size.hidden_size)} <= shapes
    assert any(shape[-1:] == (tokens,) and shape[-2] % tokens == 0 for shape, _ in watch.seen if len(shape) > 1), "scores of the plain way"


@pytest.mark.gpu
@pytest.mark.parametrize("kept", KEPT)
@pytest.mark.parametrize(("span", "tile"), [(1, 4096), (2, 128)])
def test_on_a_card_offload_spans_tiles_and_kept_outputs_change_nothing(span: int, tile: int, kept: str) -> None:
    """What is kept of layer 1 comes from its float32 input, what is made again from that input in 11 digits; layer 0's has no more."""
    from trainer.kernels import fused

    tolerance = 1e-6 if span == 2 or kept in {"nothing", "o"} else 4 * 2.0**-11
    toy, lengths = Toy(reduced("12b", 256, 512), torch.float16, "cuda"), (100, 28, 90)
    plainly = toy.stack(ops=fused, kind=attention.Turing, span_layers=span, mlp_tile_tokens=tile)
    wanted = of_ours(toy, plainly, documents(lengths), gradient(toy.size, lengths))
    where = {layer: dict.fromkeys(names, "pinned" if layer else "card") for layer, names in KEPT[kept].items()}
    model = toy.stack(
        ops=fused, kind=attention.Turing, kept=where, span_layers=span, mlp_tile_tokens=tile, keep_pinned_bytes=2**26, pin_gradients=False
    )
    first = of_ours(toy, model, documents(lengths), gradient(toy.size, lengths))
    assert worst(first, wanted) <= tolerance
    for _ in range(2):
        assert worst(of_ours(toy, model, documents(lengths), gradient(toy.size, lengths)), first) <= 1e-6
    assert model.pinned_bytes > 0


@pytest.mark.gpu
def test_on_a_card_packed_inputs_cost_little_beside_inputs_that_stay() -> None:
    from trainer.kernels import fused

    toy, lengths = Toy(reduced("12b", 256, 512), torch.float16, "cuda"), (100, 28, 90)
    answers = [
        of_ours(toy, toy.stack(ops=fused, kind=attention.Turing, offload=how), documents(lengths), gradient(toy.size, lengths))
        for how in ("ours", "stock")
    ]
    assert worst(*answers) <= 5e-3


@pytest.mark.gpu
def test_on_a_card_pinned_gradients_are_the_same_and_add_up() -> None:
    from trainer.kernels import fused

    toy, lengths = Toy(reduced("12b", 256, 512), torch.float16, "cuda"), (100, 28, 90)
    model = toy.stack(ops=fused, kind=attention.Turing, pin_gradients=True)
    wanted = of_ours(toy, toy.stack(ops=fused, kind=attention.Turing), documents(lengths), gradient(toy.size, lengths))
    for _ in range(2):
        hidden = model.hidden(row(documents(lengths), "cuda"))[0]
        hidden.backward(gradient(toy.size, lengths).to(hidden))  # type: ignore[no-untyped-call]
    assert all(one.grad is None for one in toy.parameters().values())
    model.gather()
    for name, parameter in toy.parameters().items():
        assert parameter.grad is not None
        torch.testing.assert_close(parameter.grad, 2 * wanted.gradients[name], rtol=1e-5, atol=1e-7)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_on_a_card_the_tiny_model_is_near_peft_in_float32(
    tiny: Tiny, by_peft: Found, tiny_config: Callable[..., Config], dtype: str
) -> None:
    """T4 mode and the newer cards' mode, hidden states to gradients, PEFT's adapter on the CPU being the judge."""
    there = Tiny(tiny_config(f"model.dtype={dtype}", "adapter.rank=8", "model.device=cuda"))
    model = there.model()
    chosen = there.cfg.kernels.model_copy(update={"layer": "ours"})
    settings = stack.Settings(chosen, getattr(torch, dtype), there.cfg.adapter.scale, 256, {})
    installed = stack.install(model, there.size, settings)
    first = {name: one.data for name, one in tiny.model().named_parameters() if "lora_A" in name}  # a card's random numbers are others
    for name, parameter in model.named_parameters():
        if name in first:
            parameter.data.copy_(first[name])
    train(model, installed)
    batch = models.moved(models.packed_tensors(rows()), torch.device("cuda"))
    found = step(model, batch, installed.hidden)
    found = Found(found.loss, {name: value.cpu() for name, value in found.gradients.items()})
    assert error(found, by_peft) <= (0.02 if dtype == "float16" else 0.1)
