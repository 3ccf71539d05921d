"""torch's own operators on CUDA tensors, computed on the CPU: what an emulator of a GPU that runs kdfast's kernels alone lacks."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map


def where_needed() -> contextlib.AbstractContextManager[Any]:
    """The mode below under an emulator, nothing on a GPU."""
    return OnHost() if os.environ.get("KDFAST_GPU_EMULATOR") else contextlib.nullcontext()


def is_on_gpu(x: Any) -> bool:
    return isinstance(x, Tensor) and x.is_cuda


def to_host(x: Any) -> Any:
    """A copy on the CPU of the same strides; copying the whole storage takes no kernel."""
    if not is_on_gpu(x):
        return x
    storage = torch.empty(0, dtype=x.dtype, device=x.device).set_(x.untyped_storage())
    return storage.cpu().as_strided(x.shape, x.stride(), x.storage_offset())


class OnHost(TorchDispatchMode):
    """Copies the tensors of each operator that computes to the CPU, and what it returns or writes back. kdfast's own operators, and
    views, are left alone."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        schema = func._schema
        is_view = any(r.alias_info is not None and not r.alias_info.is_write for r in schema.returns)
        given = [x for x in (*args, *kwargs.values()) for x in (x if isinstance(x, list | tuple) else [x])]
        device = kwargs.get("device")
        gpu = next((x.device for x in given if is_on_gpu(x)), None)
        if not func.namespace.startswith("aten") or is_view or (gpu is None and (device is None or device.type != "cuda")):
            return func(*args, **kwargs)
        result_on = gpu if device is None else device
        if device is not None:
            kwargs = {**kwargs, "device": torch.device("cpu")}
        on_host = tree_map(to_host, args), tree_map(to_host, kwargs)
        result = func(*on_host[0], **on_host[1])
        for i, argument in enumerate(schema.arguments):
            if argument.alias_info is None or not argument.alias_info.is_write:
                continue
            at = (argument.name, kwargs, on_host[1]) if i >= len(args) else (i, args, on_host[0])
            if is_on_gpu(written := at[1][at[0]]):
                write_back(written, at[2][at[0]])
                if result is at[2][at[0]]:
                    return written
        return tree_map(mover(result_on), result)


def mover(device: torch.device) -> Callable[[Any], Any]:
    return lambda x: x.contiguous().to(device) if isinstance(x, Tensor) else x


def write_back(to: Tensor, values: Tensor) -> None:
    storage = torch.empty(0, dtype=to.dtype, device=to.device).set_(to.untyped_storage())
    whole = storage.cpu()
    whole.as_strided(to.shape, to.stride(), to.storage_offset()).copy_(values)
    storage.copy_(whole)
