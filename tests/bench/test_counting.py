"""FLOPs and bytes, counted from execution traces that torch wrote here, and from events as a CUDA trace has them."""

from __future__ import annotations

import contextlib
import importlib
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.profiler import ExecutionTraceObserver, ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from bench import counting, kernels

tl: Any = importlib.import_module("triton.language")

Traced = Callable[[Callable[[], object]], tuple[list[dict[str, Any]], list[counting.Node]]]


@pytest.fixture
def traced(tmp_path: Path) -> Traced:
    def trace(work: Callable[[], object]) -> tuple[list[dict[str, Any]], list[counting.Node]]:
        file = tmp_path / "execution.json"
        observer = ExecutionTraceObserver().register_callback(str(file))
        with profile(activities=[ProfilerActivity.CPU], record_shapes=True, execution_trace_observer=observer) as profiler:
            work()
        return kernels.trace(profiler), counting.read_execution_trace(file)

    return trace


def only(nodes: list[counting.Node], name: str) -> counting.Done:
    (node,) = [node for node in nodes if node["name"] == name]
    return counting.operation(node, "cpu")


def test_a_product_counts_two_flops_a_multiplication_by_its_type(traced: Traced) -> None:
    half, full = torch.ones(3, 8, dtype=torch.bfloat16), torch.ones(3, 8)
    _, nodes = traced(lambda: torch.mm(half, half.t()))
    assert only(nodes, "aten::mm")[1:] == (2 * 3 * 8 * 3, 0.0, 2 * (24 + 24 + 9))
    _, nodes = traced(lambda: torch.mm(full, full.t()))
    assert only(nodes, "aten::mm")[1:] == (0.0, 2 * 3 * 8 * 3, 4 * (24 + 24 + 9))


def test_a_product_that_adds_or_has_a_batch_counts_its_factors(traced: Traced) -> None:
    _, nodes = traced(lambda: torch.baddbmm(torch.ones(2, 3, 4), torch.ones(2, 3, 5), torch.ones(2, 5, 4)))
    assert only(nodes, "aten::baddbmm").fp32_flops == 2 * 2 * 3 * 5 * 4
    _, nodes = traced(lambda: torch.addmm(torch.ones(4), torch.ones(3, 5), torch.ones(5, 4)))
    assert only(nodes, "aten::addmm")[2:] == (2 * 3 * 5 * 4, 4 * (4 + 15 + 20 + 12))


def test_backward_is_counted(traced: Traced) -> None:
    x, w = torch.ones(3, 5, requires_grad=True), torch.ones(5, 4, requires_grad=True)
    events, nodes = traced(lambda: torch.autograd.backward((x @ w).sum()))
    assert counting.count(events, nodes, [], "cpu").metrics()["fp32_flops"] == 3 * 2 * 3 * 5 * 4


def test_the_same_flops_as_torchs_own_counter(traced: Traced) -> None:
    """Which sees no kernels and no compiled code, but shares nothing with ours."""
    model = torch.nn.Sequential(torch.nn.Linear(32, 64), torch.nn.GELU(), torch.nn.Linear(64, 8))
    x = torch.ones(10, 32)
    with FlopCounterMode(display=False) as oracle:
        torch.autograd.backward(model(x).sum())
    events, nodes = traced(lambda: torch.autograd.backward(model(x).sum()))
    assert counting.count(events, nodes, [], "cpu").metrics()["fp32_flops"] == oracle.get_total_flops() > 0


@pytest.mark.parametrize(
    ("name", "work", "num_bytes"),
    [
        ("aten::add", lambda: torch.ones(1, 5).expand(7, 5) + torch.ones(7, 5), 4 * (5 + 35 + 35)),
        ("aten::add_", lambda: torch.ones(6).add_(torch.ones(6)), 4 * 18),
        ("aten::zero_", lambda: torch.empty(6).zero_(), 4 * 6),
        ("aten::copy_", lambda: torch.empty(6).copy_(torch.empty(6, dtype=torch.float64)), 4 * 6 + 8 * 6),
        ("aten::mm", lambda: torch.mm(torch.ones(3, 2), torch.ones(2, 4), out=torch.ones(3, 4)), 4 * (6 + 8 + 12)),
        ("aten::_foreach_mul_", lambda: torch._foreach_mul_([torch.ones(2), torch.ones(3)], 2.0), 4 * 2 * 5),
        ("aten::_foreach_norm", lambda: torch._foreach_norm([torch.ones(7) for _ in range(672)], 2.0), 4 * 672 * 8),
        ("aten::embedding", lambda: torch.embedding(torch.ones(100, 4), torch.tensor([1, 2, 3])), 3 * 8 + 2 * 4 * 12),
        ("aten::index_add_", lambda: torch.ones(100, 4).index_add_(0, torch.tensor([1]), torch.ones(1, 4)), 8 + 3 * 16),
    ],
)
def test_bytes_are_what_must_be_read_and_written(traced: Traced, name: str, work: Callable[[], object], num_bytes: int) -> None:
    _, nodes = traced(work)
    assert only(nodes, name).num_bytes == num_bytes


def test_views_and_allocations_move_nothing_on_a_cpu(traced: Traced) -> None:
    events, nodes = traced(lambda: torch.chunk(torch.empty(4, 4).t()[1:].reshape(12), 3))
    reshaped = only(nodes, "aten::copy_").num_bytes if any(node["name"] == "aten::copy_" for node in nodes) else 0.0
    assert counting.count(events, nodes, [], "cpu").metrics()["bytes_moved"] == reshaped


def attention(name: str, shapes: list[list[int]], window: object) -> dict[str, Any]:
    """A node as an execution trace on a card holds it, with torch's own schema."""
    declared = str(getattr(torch.ops.aten, name).default._schema)
    values: dict[str, object] = {"custom_mask_type": 1, "window_size": window}
    node: dict[str, Any] = {"name": f"aten::{name}", "id": 1, "ctrl_deps": 0, "attrs": [{"name": "op_schema", "value": declared}]}
    names = counting.arguments(node)
    place = names.index("query")
    filled = [values.get(each, "<None>") for each in names]
    sizes: list[list[int]] = [[] for _ in names]
    types = ["None" for _ in names]
    for offset, shape in enumerate(shapes):
        sizes[place + offset], types[place + offset] = shape, "Tensor(c10::Half)"
    return {**node, "inputs": {"values": filled, "shapes": sizes, "types": types}}


@pytest.mark.parametrize(("name", "factor"), [("_efficient_attention_forward", 4), ("_efficient_attention_backward", 10)])
@pytest.mark.parametrize("window", [3, "<None>"])
def test_attention_counts_pairs_inside_mask_and_window(name: str, factor: int, window: object) -> None:
    tokens, heads, width = 11, 2, 8
    node = attention(name, [[1, tokens, heads, width]] * 3, window)
    seen = sum(j <= i and (not isinstance(window, int) or i - j < window) for i in range(tokens) for j in range(tokens))
    assert counting.flops(node) == (factor * heads * width * seen, 0.0)


def _scale_in_place(x_ptr: Any, factor_ptr: Any, y_ptr: Any, n: Any, BLOCK: Any) -> None:
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    at = x_ptr + offsets
    x = tl.load(at, mask=offsets < n) * tl.load(factor_ptr)
    tl.store(at, x, mask=offsets < n)
    tl.store(y_ptr + offsets, x)


scale_in_place: Any = importlib.import_module("triton").jit(_scale_in_place)


def test_a_triton_kernels_code_says_what_it_goes_over_twice() -> None:
    found = counting.passes(scale_in_place.src)
    assert {name: times for name, times in found.items() if name.endswith("_ptr")} == {"x_ptr": 2, "factor_ptr": 1, "y_ptr": 1}


def test_a_launch_shows_its_tensors_within_the_block_only() -> None:
    x, factor, y = torch.ones(10), torch.ones(1).expand(10), torch.ones(10, dtype=torch.float16)
    with counting.recorded_launches() as found:
        (hook,) = scale_in_place.pre_run_hooks  # what Triton calls before a launch
        hook(x, factor, y, 10, BLOCK=16, num_warps=4)
    assert found == [counting.Done("_scale_in_place", num_bytes=2 * 40 + 4 + 20)]
    assert scale_in_place.pre_run_hooks == []


def kernel(name: str, external: int, dur: float, grid: int = 1) -> dict[str, Any]:
    return {"cat": "kernel", "name": name, "dur": dur, "args": {"External id": external, "grid": [grid, 1, 1]}}


def on_card(nodes: list[counting.Node]) -> None:
    for node in nodes:
        for side in ("inputs", "outputs"):
            for found in node[side]["values"]:
                if isinstance(found, list):
                    with contextlib.suppress(ValueError):
                        found[found.index("cpu")] = "cuda:0"


def test_on_a_card_an_operation_counts_once_and_only_if_it_launched_a_kernel(traced: Traced) -> None:
    events, nodes = traced(lambda: (torch.mm(torch.ones(3, 2), torch.ones(2, 4)), torch.ones(9) * 2))
    on_card(nodes)
    external = {event["name"]: event["args"]["External id"] for event in events if event.get("cat") == "cpu_op"}
    launched = [kernel("gemm", external["aten::mm"], 6.0), kernel("reduce_splits", external["aten::mm"], 2.0)]
    found = counting.count([*events, *launched], nodes, [], "cuda")
    assert found.done == [counting.Done("aten::mm", 0.0, 2 * 3 * 2 * 4, 4 * (6 + 8 + 12))]
    assert (found.kernel_us, found.unknown_us) == (8.0, {})


def test_kernels_that_nobody_knows_lower_the_share(traced: Traced) -> None:
    events, nodes = traced(lambda: torch.ones(1))
    launch = counting.Done("scale_in_place", num_bytes=300.0)
    copy = {"cat": "gpu_memcpy", "name": "Memcpy DtoH (Device -> Pinned)", "dur": 9.0, "args": {"bytes": 64}}
    launched = [kernel("scale_in_place", 0, 3.0), kernel("mystery", 0, 1.0), copy]
    metrics = counting.count([*events, *launched], nodes, [launch], "cuda").metrics()
    assert metrics["counted_share"] == 0.75
    assert metrics["bytes_moved"] == 300.0
    assert metrics["copied_bytes"] == 64.0
    assert metrics["t4_peak_s"] == pytest.approx(300.0 / 300e9)


def test_bitsandbytes_kernels_tell_their_size_by_their_grid() -> None:
    n = 4 * 1024
    name = "void kDequantizeBlockwise<{}, 512, 64, 8, {}>(float*, unsigned char*, float*, {}*, int, int)"
    nf4 = counting.dequantised(kernel(name.format("__half", 2, "__half"), 0, 1.0, grid=4))
    assert nf4.num_bytes == n / 2 + n / 64 * 4 + 2 * n
    scales = counting.dequantised(kernel(name.format("float", 0, "float"), 0, 1.0, grid=4))
    assert scales.num_bytes == 2048 + 2048 / 256 * 4 + 4 * 2048


def test_the_time_on_a_t4_is_the_larger_of_arithmetic_and_memory() -> None:
    one = counting.Done("x", tensor_flops=65e12, fp32_flops=8.1e12, num_bytes=300e9)
    assert one.seconds(counting.T4_TENSOR) == pytest.approx(2.0)
    assert one.seconds(counting.T4_SUSTAINED) == pytest.approx(65 / 24 + 1)
    assert counting.Done("x", tensor_flops=1.0, num_bytes=600e9).seconds(counting.T4_TENSOR) == pytest.approx(2.0)
    assert math.isclose(counting.Counted([one, one], 0.0, {}, 0.0).metrics()["t4_peak_s"], 4.0)
