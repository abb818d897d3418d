"""FLOPs and bytes of a profiled step, from what really ran: shapes of every operation, joined to the kernels that it launched.

Three sources, all written while the same step runs. torch's trace says which operation launched which kernel ("External id").
torch's execution trace holds the shapes, strides and dtypes of every operation's inputs and outputs, of inductor's Triton
kernels and of custom operations too, in forward, recompute and backward. A hook that Triton calls before each launch of a
kernel that is called directly shows its tensors. Kernels of bitsandbytes that unsloth calls past torch tell their size by
their grid. What is counted how:

- matrix products: 2 m n k, as `tensor_flops` in 16 bit and as `fp32_flops` in float32 (CUDA cores; a T4 has no TF32).
- CUTLASS attention (`_efficient_attention`): pairs inside the causal mask and the window, 4 FLOPs a pair and dimension
  forward, 10 backward. One document a row; blocks that the mask cuts are done whole by the kernel, which is not counted.
  Attention by plain products (the MATH kernel, ours) is products as above, masked pairs included: that is what runs.
- bytes: each tensor that is read, once, and each that is written, once: what no cache could spare. Expanded dimensions count
  once, gathered rows as often as they are gathered, a direct Triton kernel's argument twice where its code loads and stores
  it. An inductor kernel's arguments count once, though some are updated in place.
- not counted: arithmetic outside of products, copies between host and card (`copied_bytes` says how many), kernels that none
  of the above knows (`counted_share` says how much of the kernel time is known).
"""

from __future__ import annotations

import ast
import gzip
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from bench.mix import jit_functions

T4_TENSOR = 65e12
T4_SUSTAINED = 24e12
"""FLOP/s of cuBLAS float16 that a T4's 70 W sustained for a user (docs/kernels.md)."""
T4_FP32 = 8.1e12
T4_BYTES = 300e9

Node = Mapping[str, Any]
"""An operation of torch's execution trace."""
SIXTEEN = ("c10::Half", "c10::BFloat16")
PRODUCTS = {"aten::mm": 0, "aten::bmm": 0, "aten::addmm": 1, "aten::baddbmm": 1}
"""Operations that are a matrix product, and the place of its first factor among the inputs."""
ATTENTION = {"aten::_efficient_attention_forward": 4, "aten::_efficient_attention_backward": 10}
"""FLOPs per pair of query and key and per dimension of a head."""
GATHERS = {"aten::embedding", "aten::index_select", "aten::index", "aten::gather"}
"""They read as much of their first input as they write."""
SCATTERS = {"aten::index_put_", "aten::_index_put_impl_", "aten::index_add_", "aten::index_copy_", "aten::scatter_", "aten::scatter_add_"}
"""They read and write as much of their first input as their last one holds."""
OVERWRITES = {"aten::copy_", "aten::fill_", "aten::zero_", "aten::normal_", "aten::uniform_", "aten::random_"}
"""In place, and nothing of the old value is read."""
NF4 = 2
"""bitsandbytes' number of the data type, the last template argument of kDequantizeBlockwise; 0 is 8 bit."""


class Done(NamedTuple):
    """One operation or kernel and what it did."""

    name: str
    tensor_flops: float = 0.0
    fp32_flops: float = 0.0
    num_bytes: float = 0.0

    def seconds(self, tensor_flops_per_s: float) -> float:
        """Least time on a T4 whose tensor cores do that much."""
        return max(self.tensor_flops / tensor_flops_per_s + self.fp32_flops / T4_FP32, self.num_bytes / T4_BYTES)


class Counted(NamedTuple):
    done: list[Done]
    kernel_us: float
    unknown_us: dict[str, float]
    """Kernels that nothing here counts, by name."""
    copied_bytes: float

    def metrics(self) -> dict[str, Any]:
        return {
            "tensor_flops": sum(one.tensor_flops for one in self.done),
            "fp32_flops": sum(one.fp32_flops for one in self.done),
            "bytes_moved": sum(one.num_bytes for one in self.done),
            "t4_peak_s": sum(one.seconds(T4_TENSOR) for one in self.done),
            "t4_sustained_s": sum(one.seconds(T4_SUSTAINED) for one in self.done),
            "kernel_s": self.kernel_us / 1e6 if self.kernel_us else None,
            "counted_share": 1 - sum(self.unknown_us.values()) / self.kernel_us if self.kernel_us else None,
            "copied_bytes": self.copied_bytes,
        }

    def by_name(self) -> list[dict[str, Any]]:
        """Sums by operation, the longest on a T4 first."""
        found: dict[str, list[Done]] = {}
        for one in self.done:
            found.setdefault(one.name, []).append(one)
        sums = [
            {
                "name": name,
                "count": len(ones),
                "tensor_flops": sum(one.tensor_flops for one in ones),
                "fp32_flops": sum(one.fp32_flops for one in ones),
                "bytes_moved": sum(one.num_bytes for one in ones),
                "t4_peak_s": sum(one.seconds(T4_TENSOR) for one in ones),
                "t4_sustained_s": sum(one.seconds(T4_SUSTAINED) for one in ones),
            }
            for name, ones in found.items()
        ]
        return sorted(sums, key=lambda one: -float(one["t4_peak_s"]))


def count(events: Sequence[Mapping[str, Any]], nodes: Sequence[Node], launches: Sequence[Done], device: str) -> Counted:
    """events: torch's trace. nodes: its execution trace. launches: of Triton kernels, by recorded_launches()."""
    if device == "cpu":
        return Counted([operation(node, device) for node in leaves(nodes)], 0.0, {}, 0.0)
    of_record = {attribute(node, "rf_id"): node for node in nodes}
    of_event = {
        event["args"]["External id"]: of_record.get(event["args"].get("Record function id"))
        for event in events
        if event.get("cat") == "cpu_op" and "External id" in event["args"]
    }
    hooked = {launch.name for launch in launches}
    found, total = list(launches), 0.0
    owners: dict[int, Node] = {}
    unknown: dict[str, float] = {}
    for event in events:
        if event.get("cat") != "kernel":
            continue
        total += float(event["dur"])
        owner = of_event.get(event["args"].get("External id"))
        if event["name"] in hooked:
            continue
        if "kDequantizeBlockwise" in event["name"]:
            found.append(dequantised(event))
        elif owner is not None and is_operation(owner["name"]):
            owners[owner["id"]] = owner  # once, however many kernels it launched
        else:
            unknown[event["name"]] = unknown.get(event["name"], 0.0) + float(event["dur"])
    found += [operation(node, device) for node in owners.values()]
    copied = sum(
        float(event["args"].get("bytes", 0)) for event in events if event.get("cat") == "gpu_memcpy" and "DtoD" not in event["name"]
    )
    return Counted(found, total, unknown, copied)


def is_operation(name: str) -> bool:
    """Not a node of autograd, which owns what is launched inside it and by no operation: its inputs say nothing."""
    return name.startswith("triton_") or ("::" in name and not name.startswith("autograd::"))


def operation(node: Node, device: str) -> Done:
    tensor, fp32 = flops(node)
    return Done(node["name"], tensor, fp32, moved(node, device))


def leaves(nodes: Sequence[Node]) -> Iterator[Node]:
    """On a CPU no kernel says what worked: products, and operations that call no other one; views, allocations and questions aside."""
    parents = {node["ctrl_deps"] for node in nodes}
    products = {node["id"] for node in nodes if node["name"] in PRODUCTS}
    for node in nodes:
        if node["id"] in products or (node["id"] not in parents and node["ctrl_deps"] not in products and _works(node)):
            yield node


def _works(node: Node) -> bool:
    if not is_operation(node["name"]) or node["name"].startswith(("aten::empty", "aten::resize", "profiler::")):
        return False
    written, storages = list(tensors(node["outputs"])), {one.storage for one in tensors(node["inputs"])}
    return bool(_mutable(node)) or (bool(written) and not any(one.storage in storages for one in written))


def flops(node: Node) -> tuple[float, float]:
    """On tensor cores, and in float32."""
    shapes = node["inputs"]["shapes"]
    if node["name"] in PRODUCTS:
        place = PRODUCTS[node["name"]]
        *batch, m, k = shapes[place]
        number = 2.0 * math.prod(batch) * m * k * shapes[place + 1][-1]
        return (number, 0.0) if any(name in node["inputs"]["types"][place] for name in SIXTEEN) else (0.0, number)
    if node["name"] in ATTENTION:
        place = arguments(node).index("query")
        (batch_size, queries, heads, width), keys = shapes[place], shapes[place + 1][1]
        seen = pairs(queries, keys, causal=value(node, "custom_mask_type") != 0, window=value(node, "window_size"))
        number = float(ATTENTION[node["name"]] * batch_size * heads * width * seen)
        return (number, 0.0) if any(name in node["inputs"]["types"][place] for name in SIXTEEN) else (0.0, number)
    return 0.0, 0.0


def pairs(queries: int, keys: int, *, causal: bool, window: object) -> int:
    """Pairs of query i and key j with j <= i where causal, and i - j < window where there is one."""
    if not causal:
        return queries * keys
    width = window if isinstance(window, int) and window > 0 else keys
    return sum(min(place + 1, width, keys) for place in range(queries))


def moved(node: Node, device: str) -> float:
    """Bytes read and written on the device."""
    inputs, outputs = (list(tensors(node[side])) for side in ("inputs", "outputs"))
    size = partial(_bytes, device=device)
    if node["name"] in GATHERS:
        return size(inputs[1:]) + 2 * size(outputs)
    if node["name"] in SCATTERS:
        return size(inputs[1:]) + 2 * size(inputs[-1:])
    changed = [one for one in inputs if one.argument in _mutable(node)]
    if node["name"] in OVERWRITES or _writes_out(node):
        inputs = [one for one in inputs if one not in changed]
    return size(inputs) + size(outputs or changed)


class Tensor(NamedTuple):
    argument: int
    storage: int
    num_bytes: int
    device: str


def tensors(side: Mapping[str, Any]) -> Iterator[Tensor]:
    """Of a node's inputs or outputs. A tensor's value is [id, storage, offset, elements, bytes an element, device]."""
    for place, (found, shape, stride) in enumerate(_aligned(side["values"], side["shapes"], side.get("strides"))):
        yield from _flat(place, found, shape, stride)


def _flat(place: int, found: Any, shape: Any, stride: Any) -> Iterator[Tensor]:
    if not isinstance(found, list):
        return
    if any(isinstance(each, list) for each in found):
        for each in _aligned(found, shape, stride):
            yield from _flat(place, *each)
    elif len(found) == 6 and isinstance(found[5], str):
        same = math.prod(length for length, step in zip(shape, stride, strict=False) if step == 0 and length)
        yield Tensor(place, found[1], found[3] // same * found[4], found[5])


def _aligned(found: list[Any], shapes: Any, strides: Any) -> Iterator[tuple[Any, Any, Any]]:
    """Where a list's shapes or strides are not one for each value, they say nothing."""
    filled = [each if isinstance(each, list) and len(each) == len(found) else [[]] * len(found) for each in (shapes, strides)]
    yield from zip(found, *filled, strict=True)


def _bytes(found: Iterable[Tensor], device: str) -> float:
    return float(sum(one.num_bytes for one in found if one.device.startswith(device)))


def attribute(node: Node, name: str) -> Any:
    return next((one["value"] for one in node["attrs"] if one["name"] == name), None)


def schema(node: Node) -> str:
    return attribute(node, "op_schema") or ""


def arguments(node: Node) -> list[str]:
    """Names of the inputs."""
    return [text.partition("=")[0].split()[-1] for text in _declared(node)]


def value(node: Node, argument: str) -> Any:
    names = arguments(node)
    return node["inputs"]["values"][names.index(argument)] if argument in names else None


def _declared(node: Node) -> list[str]:
    """Inputs as the schema declares them; commas inside brackets separate values of a default."""
    text = schema(node)
    inside = text[text.find("(") + 1 : text.rfind(") ->")]
    parts, depth = [""], 0
    for character in inside:
        depth += (character in "([") - (character in ")]")
        if character == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += character
    return [part.strip() for part in parts if part.strip() not in {"", "*"}]


def _mutable(node: Node) -> set[int]:
    return {place for place, text in enumerate(_declared(node)) if "!" in text.split(" ")[0]}


def _writes_out(node: Node) -> bool:
    return any("!" in text and text.endswith(" out") for text in _declared(node))


def dequantised(event: Mapping[str, Any]) -> Done:
    """bitsandbytes' kDequantizeBlockwise<T, 512, 64, 8, type>: a block of threads makes 1024 weights of NF4, 512 of 8 bit.

    Reads codes and a float32 scale per 64 weights (NF4) or 256 (the scales' own second level), writes T.
    """
    name = str(event["name"])
    kinds = name[name.index("<") + 1 : name.index(">")].split(",")
    four_bit = "".join(filter(str.isdigit, kinds[-1]))[-1:] in {"1", str(NF4)}
    number = float(event["args"]["grid"][0]) * (1024 if four_bit else 512)
    read = number / 2 + number / 64 * 4 if four_bit else number + number / 256 * 4
    return Done("kDequantizeBlockwise", num_bytes=read + number * (4 if "float" in kinds[0] and "bfloat" not in kinds[0] else 2))


@contextmanager
def recorded_launches() -> Iterator[list[Done]]:
    """Fills the list with every launch within the block of a Triton kernel that is called directly. Kernels must exist before."""
    found: list[Done] = []
    hooks = [(function, _hook(function, found)) for function in jit_functions()]
    for function, hook in hooks:
        function.pre_run_hooks.append(hook)
    try:
        yield found
    finally:
        for function, hook in hooks:
            function.pre_run_hooks.remove(hook)


def _hook(function: Any, found: list[Done]) -> Callable[..., None]:
    times = passes(function.src)

    def remember(*given: Any, **named: Any) -> None:
        bound = dict(zip(function.arg_names, given, strict=False)) | named
        found.append(Done(function.__name__, num_bytes=sum(times.get(name, 1) * _size(each) for name, each in bound.items())))

    return remember


def _size(found: Any) -> int:
    """Bytes of a tensor's own elements; of anything else 0."""
    if not hasattr(found, "data_ptr") or not hasattr(found, "element_size"):
        return 0
    elements = math.prod(length for length, step in zip(found.shape, found.stride(), strict=True) if step != 0)
    return int(elements * found.element_size())


def passes(source: str) -> dict[str, int]:
    """How often a Triton kernel's code goes over each pointer: 2 where it both loads and stores, else 1. Pointers that are computed
    from an argument in an assignment are followed; what a function that it calls does with them is not seen."""
    (function,) = ast.parse(source).body
    assert isinstance(function, ast.FunctionDef)
    roots = {argument.arg: {argument.arg} for argument in function.args.args}
    uses: dict[str, set[str]] = {}
    for node in sorted(ast.walk(function), key=lambda one: getattr(one, "lineno", 0)):
        if isinstance(node, ast.Assign) and not _accesses(node.value):
            for target in node.targets:
                if isinstance(target, ast.Name):
                    roots[target.id] = roots.get(target.id, set()) | _roots(node.value, roots)
        for call in [node] if isinstance(node, ast.Call) else []:
            kind = call.func.attr if isinstance(call.func, ast.Attribute) else ""
            if kind in {"load", "store"} and call.args:
                for root in _roots(call.args[0], roots):
                    uses.setdefault(root, set()).add(kind)
    return {name: len(kinds) for name, kinds in uses.items()}


def _accesses(node: ast.AST) -> bool:
    return any(isinstance(one, ast.Attribute) and one.attr in {"load", "store"} for one in ast.walk(node))


def _roots(node: ast.AST, roots: Mapping[str, set[str]]) -> set[str]:
    return {root for one in ast.walk(node) if isinstance(one, ast.Name) for root in roots.get(one.id, set())}


def read_execution_trace(path: Path) -> list[Node]:
    """The operations in what torch.profiler.ExecutionTraceObserver wrote."""
    data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    nodes: list[Node] = json.loads(data)["nodes"]
    return nodes
