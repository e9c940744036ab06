"""Device and dtype, decided once; batches that shrink when memory runs out; seeds; progress.

The only module that knows what kinds of device exist. Below it, everything follows its input.
"""

from __future__ import annotations

import math
import os
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import TypeVar

import torch
from torch import Tensor
from tqdm.auto import tqdm

from opsin.errors import InvalidConfig, ResourceError

T = TypeVar("T")
R = TypeVar("R")

DTYPES = {
    "float32": torch.float32,
    "fp32": torch.float32,
    "bfloat16": torch.bfloat16,
    "bf16": torch.bfloat16,
    "float16": torch.float16,
    "fp16": torch.float16,
    "float64": torch.float64,
}


def resolve_device(device: str | torch.device | None = None) -> torch.device:
    """The device to work on: the one named, else ``OPSIN_DEVICE``, else the machine's accelerator, else the CPU."""
    wanted = device if device is not None else os.environ.get("OPSIN_DEVICE")
    if wanted is None:
        return torch.accelerator.current_accelerator() or torch.device("cpu")
    try:
        resolved = torch.device(wanted)
        if resolved.type != "meta":
            torch.empty(0, device=resolved)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ResourceError(
            "The device must exist on this machine",
            got=wanted,
            remedy='"opsin doctor" lists the devices; "cpu" always works.',
        ) from error
    return resolved


def has_fast_bfloat16(device: torch.device) -> bool:
    """Whether bfloat16 matrix products run in hardware on ``device``."""
    if device.type == "cpu":
        flags = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
        return bool(flags.get("avx512_bf16") or flags.get("amx_bf16") or flags.get("bf16"))
    if device.type == "mps":
        return False
    module = getattr(torch, device.type, None)
    supported = getattr(module, "is_bf16_supported", None)
    return bool(supported()) if callable(supported) else False


def resolve_dtype(dtype: str | torch.dtype | None, device: torch.device, *, allow_bfloat16: bool = True) -> torch.dtype:
    """``None`` means float32; ``"auto"`` bfloat16 where the hardware has it and the model's card allows it."""
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype is None:
        return torch.float32
    if dtype == "auto":
        return torch.bfloat16 if allow_bfloat16 and has_fast_bfloat16(device) else torch.float32
    if dtype not in DTYPES:
        raise InvalidConfig(f"dtype is auto or one of {', '.join(DTYPES)}", got=dtype)
    return DTYPES[dtype]


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception means that a device or the host ran out of memory."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in str(error)


def in_batches(function: Callable[[Sequence[T]], Sequence[R]], items: Sequence[T], batch_size: int) -> list[R]:
    """``function`` over ``items`` in batches; out of memory halves the batch and tries those items again."""
    if batch_size < 1:
        raise InvalidConfig("batch_size is at least 1", got=batch_size)
    results: list[R] = []
    while len(results) < len(items):
        batch = items[len(results) : len(results) + batch_size]
        try:
            results.extend(function(batch))
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            if len(batch) == 1:
                raise ResourceError(
                    "One item must fit into memory",
                    got=str(error).splitlines()[0],
                    remedy="Use a smaller image size, a smaller model, dtype='bfloat16', or device='cpu'.",
                ) from error
        else:
            continue
        _release_memory()  # outside the handler: the traceback would keep the failed batch alive
        batch_size = max(1, len(batch) // 2)
    return results


def _release_memory() -> None:
    if torch.accelerator.is_available():
        getattr(torch, torch.accelerator.current_accelerator().type).empty_cache()  # type: ignore[union-attr]


_MATMUL = threading.Lock()
_inside = 0  # how many blocks of fast_matmul() are open, in whatever thread


@contextmanager
def fast_matmul() -> Iterator[None]:
    """Within it, float32 matrix products take oneDNN instead of MKL where that is faster and no less exact.

    torch offers that choice only as ``set_float32_matmul_precision("medium")``. On CPUs without matrix units for
    bfloat16 nothing is rounded by it, which is measured once; where something is, where there is an accelerator (whose
    products it would round) or where the caller has chosen a precision already, nothing happens. The setting belongs to
    the process: it is put back when the last of all open blocks ends.
    """
    global _inside
    with _MATMUL:
        useful = _inside > 0 or (torch.get_float32_matmul_precision() == "highest" and _medium_is_exact())
        if useful:
            _inside += 1
            torch.set_float32_matmul_precision("medium")
    try:
        yield
    finally:
        if useful:
            with _MATMUL:
                _inside -= 1
                if not _inside:
                    torch.set_float32_matmul_precision("highest")


@cache
def _medium_is_exact() -> bool:
    """Whether precision "medium" loses nothing here: a product of 10⁸ steps against float64."""
    if torch.accelerator.is_available() or not torch.backends.mkldnn.is_available():
        return False
    draw = generator(0)
    a, b = torch.randn((256, 768), generator=draw), torch.randn((768, 512), generator=draw)
    torch.set_float32_matmul_precision("medium")
    try:
        error = ((a @ b).double() - a.double() @ b.double()).norm() / math.sqrt(a.numel() * b.shape[1])
    finally:
        torch.set_float32_matmul_precision("highest")
    return bool(error < 3e-6)


def generator(seed: int) -> torch.Generator:
    """A CPU generator with ``seed``: the same draw on every machine and device."""
    return torch.Generator("cpu").manual_seed(seed)


def progress(items: Iterable[T], *, total: int | None = None, description: str = "", unit: str = "it") -> Iterator[T]:
    """``items`` with a progress bar on stderr; silent when stderr is not a terminal or ``OPSIN_PROGRESS=0``."""
    hidden = os.environ.get("OPSIN_PROGRESS") == "0" or not sys.stderr.isatty()
    return iter(tqdm(items, total=total, desc=description, unit=unit, disable=hidden, dynamic_ncols=True))


def to_model(tensor: Tensor, module: torch.nn.Module) -> Tensor:
    """``tensor`` on the device and in the dtype of ``module``'s parameters."""
    parameter = next(module.parameters())
    return tensor.to(device=parameter.device, dtype=parameter.dtype)
