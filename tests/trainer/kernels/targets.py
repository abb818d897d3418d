"""Compile a kernel for a card that is not here, with the specialisation of a real call, and run such code on the card that is.

A copy of fused.py gets a Launcher in place of each of its kernels, so what is compiled is what its functions ask for.
"""

from __future__ import annotations

import ctypes
import importlib.util
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from trainer.kernels import fused, fused_softmax

SHARED_BYTES = 64 * 1024
"""What a T4's multiprocessor has."""
_POINTERS = {
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.float32: "*fp32",
    torch.int32: "*i32",
    torch.int64: "*i64",
    torch.uint8: "*u8",
}
Act = Callable[[Any, tuple[int, ...], list[Any]], None]
"""What to do with compiled code, its grid and its arguments."""


class Launcher:
    """`kernel[grid](...)`, for another compute capability (75 is sm_75)."""

    def __init__(self, kernel: Any, capability: int, act: Act) -> None:
        self._kernel, self._capability, self._act = kernel, capability, act

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def launch(*args: Any, **more: Any) -> None:
            names = self._kernel.arg_names
            values = dict(zip(names, args, strict=False)) | {name: value for name, value in more.items() if name in names}
            options = {name: value for name, value in more.items() if name not in names}
            compiled = compile_for(self._kernel, values, self._capability, options)
            constants = {param.name for param in self._kernel.params if param.is_constexpr}
            self._act(compiled, grid, [values[name] for name in names if name not in constants])

        return launch


def compile_for(kernel: Any, values: dict[str, Any], capability: int, options: dict[str, Any]) -> Any:
    """As triton specialises a call: types, aligned pointers and integers that divide by 16."""
    signature, constants, attributes = {}, {}, {}
    for place, param in enumerate(kernel.params):
        value = values[param.name]
        signature[param.name] = _type(value, constant=param.is_constexpr)
        if param.is_constexpr:
            constants[param.name] = value
        elif _divides(value):
            attributes[(place,)] = [["tt.divisibility", 16]]
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def _type(value: Any, *, constant: bool) -> str:
    if constant:
        return "constexpr"
    if isinstance(value, torch.Tensor):
        return _POINTERS[value.dtype]
    if isinstance(value, float):
        return "fp32"
    return "i32" if -(2**31) <= value < 2**31 else "i64"


def _divides(value: Any) -> bool:
    if isinstance(value, float):
        return False
    return (value.data_ptr() if isinstance(value, torch.Tensor) else int(value)) % 16 == 0


def built_for(capability: int, act: Act) -> ModuleType:
    """fused.py once more, its kernels compiled for that card."""
    whole, softmax = (_copy(module, capability, act) for module in (fused, fused_softmax))
    for name in fused.__all__:
        if hasattr(softmax, name):
            setattr(whole, name, getattr(softmax, name))
    return whole


def _copy(module: ModuleType, capability: int, act: Act) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"{module.__name__}_sm{capability}", Path(str(module.__file__)))
    assert spec is not None and spec.loader is not None
    copy = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(copy)
    for name, value in list(vars(copy).items()):
        if name.endswith("_kernel"):
            setattr(copy, name, Launcher(value, capability, act))
    return copy


def complaints(compiled: Any, capability: int) -> Iterator[str]:
    """What an sm_75 has not, or what our kernels leave to cuBLAS."""
    for stage in ("ttir", "ttgir"):
        yield from (f"{stage}: {found}" for found in set(re.findall(r"\w+\.(?:\w+_)?dot\w*", compiled.asm[stage])))
    # An sm_75 would do bfloat16 with integers and float64 at a 32nd of its speed, so the types are looked for, not the instructions.
    unwanted = "f64|bf16" if capability < 80 else "f64"
    yield from (f"ttir: {found}" for found in set(re.findall(rf"(?:{unwanted})(?=[>,\s)])", compiled.asm["ttir"])))
    ptx = compiled.asm["ptx"]
    yield from (f"ptx: {found}" for found in set(re.findall(r"\b\w*mma[\w.]*", ptx)))
    if f".target sm_{capability}" not in ptx:
        yield f"ptx: not for sm_{capability}"
    if compiled.metadata.shared > SHARED_BYTES:
        yield f"{compiled.metadata.shared} bytes of shared memory"


class Driver:
    """Loads PTX with the CUDA driver, which compiles it for the card at hand, and launches it on torch's stream."""

    def __init__(self) -> None:
        torch.cuda.current_stream().synchronize()  # torch's context is the thread's own from here on
        self._cuda = ctypes.CDLL("libcuda.so.1")
        self._functions: dict[str, ctypes.c_void_p] = {}

    def __call__(self, compiled: Any, grid: tuple[int, ...], values: list[Any]) -> None:
        name, ptx = compiled.metadata.name, compiled.asm["ptx"]
        given = [_argument(value) for value in values]
        declared = re.findall(r"\.param\s+\.\w+", ptx[ptx.index(".entry") : ptx.index("{", ptx.index(".entry"))])
        given += [ctypes.c_uint64(0) for _ in declared[len(given) :]]  # scratch memory, which these kernels have no use for
        assert len(given) == len(declared)
        array = (ctypes.c_void_p * len(given))(*(ctypes.addressof(one) for one in given))
        sizes = [*grid, *[1] * (3 - len(grid)), 32 * compiled.metadata.num_warps, 1, 1, compiled.metadata.shared]
        stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
        self._check(self._cuda.cuLaunchKernel(self._function(name, ptx), *map(ctypes.c_uint, sizes), stream, array, None))

    def _function(self, name: str, ptx: str) -> ctypes.c_void_p:
        if ptx not in self._functions:
            module, function = ctypes.c_void_p(), ctypes.c_void_p()
            self._check(self._cuda.cuModuleLoadData(ctypes.byref(module), ctypes.c_char_p(ptx.encode())))
            self._check(self._cuda.cuModuleGetFunction(ctypes.byref(function), module, ctypes.c_char_p(name.encode())))
            self._functions[ptx] = function
        return self._functions[ptx]

    def _check(self, result: int) -> None:
        if result != 0:
            text = ctypes.c_char_p()
            self._cuda.cuGetErrorString(result, ctypes.byref(text))
            raise RuntimeError(f"CUDA driver: {result}, {(text.value or b'').decode()}")


def _argument(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return ctypes.c_uint64(value.data_ptr())
    if isinstance(value, float):
        return ctypes.c_float(value)
    return ctypes.c_int32(value) if -(2**31) <= value < 2**31 else ctypes.c_int64(value)
