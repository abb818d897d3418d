"""Where tensors wait between the forward and the backward pass: pinned host memory, or the card.

A layer's input is float32 and reaches 8e5. It waits in 16 bits with one power of two a row (plain.pack): 11 digits in float16 for
everything within 2^-28 of a row's largest value, half the bytes of float32, and no bfloat16 arithmetic. Copies run on a stream of their
own; the one that backward needs next is on its way while the present layer computes.

Pinned memory is one arena that is registered with CUDA as it is: torch's own allocator rounds each block up to a power of two, which
would turn 4.5 GB into 8.
"""

from __future__ import annotations

import mmap
import weakref
from collections import deque
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from trainer.errors import ConfigError

_ALIGN = 4096
_PACKED = torch.float16
"""Of a residual, in bfloat16 mode too: its row has a scale, and 11 digits are 3 more."""
_LEAVING = 3
"""Copies to the host that may be under way while the next layers compute; what they read stays on the card as long."""


class Ticket(NamedTuple):
    """A tensor that waits: on the card as it is, or in the arena."""

    there: Tensor | None
    host: Tensor | None
    scale_T: Tensor | None
    forward: int = 0
    """Number of the forward pass that put it away."""


class Arena:
    """Pinned memory of num_bytes. MemoryError where the host has not so much."""

    def __init__(self, num_bytes: int) -> None:
        self.num_bytes = num_bytes
        self._bytes = torch.frombuffer(mmap.mmap(-1, max(num_bytes, _ALIGN)), dtype=torch.uint8)
        result = torch.cuda.cudart().cudaHostRegister(self._bytes.data_ptr(), self._bytes.numel(), 0)
        if int(result) != 0:
            raise MemoryError(f"{num_bytes / 1e9:.2f} GB of host memory could not be pinned: {result}")
        weakref.finalize(self, _release, self._bytes)
        self._used = 0

    def reset(self) -> None:
        self._used = 0

    def take(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor | None:
        """A piece, or None where it does not fit."""
        num = dtype.itemsize * int(torch.Size(shape).numel())
        if self._used + num > self.num_bytes:
            return None
        piece = self._bytes[self._used : self._used + num].view(dtype).view(shape)
        self._used += -(-num // _ALIGN) * _ALIGN
        return piece


def _release(pinned: Tensor) -> None:
    torch.cuda.synchronize()
    torch.cuda.cudart().cudaHostUnregister(pinned.data_ptr())


class Waiting:
    """Puts tensors away and brings them back, last in, first out. Without an arena everything stays on the card."""

    def __init__(self, arena: Arena | None, ops: ModuleType) -> None:
        self._arena, self._ops = arena, ops
        self._stream = torch.cuda.Stream() if arena else None
        self._coming: dict[int, tuple[Tensor, torch.cuda.Event]] = {}
        self._leaving: deque[tuple[Tensor, torch.cuda.Event]] = deque()
        self._residuals: list[Ticket] = []
        self._forward = 0

    @property
    def pinned_bytes(self) -> int:
        return self._arena.num_bytes if self._arena else 0

    def begin(self) -> None:
        """Before a forward pass: what waited is gone."""
        self._forward += 1
        if self._stream:
            torch.cuda.current_stream().wait_stream(self._stream)  # what is dropped here may still be read or written there
        self._leaving.clear()
        self._coming.clear()
        self._residuals.clear()
        if self._arena:
            self._arena.reset()

    def put_residual(self, x_TH: Tensor) -> Ticket:
        """A layer's input.

        Raises:
            ConfigError: more tokens than the arena was made for.
        """
        if self._arena is None:
            return Ticket(x_TH, None, None)
        host = self._room(x_TH, _PACKED)
        packed = torch.empty_like(x_TH, dtype=_PACKED)
        scale = self._ops.pack(x_TH, packed)
        self._copy(host, packed)
        self._residuals.append(Ticket(None, host, scale, self._forward))
        return self._residuals[-1]

    def put(self, x: Tensor, where: str) -> Ticket:
        """An output that is kept, on the `card` or `pinned`. Raises ConfigError as put_residual does."""
        if where == "card" or self._arena is None:
            return Ticket(x, None, None)
        host = self._room(x, x.dtype)
        self._copy(host, x)
        return Ticket(None, host, None, self._forward)

    def _room(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        assert self._arena is not None
        host = self._arena.take(tuple(x.shape), dtype)
        if host is None:
            raise ConfigError(
                f"{self._arena.num_bytes:,} bytes of pinned memory are too few for a row of {len(x)} tokens: "
                "lower data.max_tokens or train.batch_records, or kernels.keep_pinned_bytes"
            )
        return host

    def fetch(self, ticket: Ticket | None) -> None:
        """Start bringing it back."""
        if ticket is None or ticket.host is None or ticket.host.data_ptr() in self._coming:
            return
        assert self._stream is not None
        target = torch.empty(ticket.host.shape, dtype=ticket.host.dtype, device="cuda")
        self._stream.wait_stream(torch.cuda.current_stream())  # target's memory may still be read by what was queued before
        with torch.cuda.stream(self._stream):
            target.copy_(ticket.host, non_blocking=True)
        arrived = torch.cuda.Event()
        arrived.record(self._stream)
        self._coming[ticket.host.data_ptr()] = (target, arrived)

    def ahead(self) -> None:
        """Start bringing back the residual that backward needs next."""
        self.fetch(self._residuals[-1] if self._residuals else None)

    def get(self, ticket: Ticket) -> Tensor:
        """The tensor; a residual as float32."""
        if ticket.host is None:
            assert ticket.there is not None
            return ticket.there
        if ticket.forward != self._forward:
            raise RuntimeError("a backward pass must come before the next forward pass: its tensors have been overwritten")
        self._left(0)
        self.fetch(ticket)
        target, arrived = self._coming.pop(ticket.host.data_ptr())
        torch.cuda.current_stream().wait_event(arrived)
        if ticket.scale_T is not None:
            self._residuals.pop()
        return target if ticket.scale_T is None else self._ops.unpack(target, ticket.scale_T)

    def _copy(self, host: Tensor, there: Tensor) -> None:
        assert self._stream is not None
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            host.copy_(there, non_blocking=True)
        gone = torch.cuda.Event()
        gone.record(self._stream)
        self._leaving.append((there, gone))
        self._left(_LEAVING)

    def _left(self, most: int) -> None:
        """Let go of what was copied, the oldest first, until `most` are left. Not record_stream: with it a host that runs ahead of the
        card would be given new memory for each copy that the card has not come to yet."""
        while len(self._leaving) > most:
            there, gone = self._leaving.popleft()
            torch.cuda.current_stream().wait_event(gone)
            del there
