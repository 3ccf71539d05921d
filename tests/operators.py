"""torch.library.opcheck of every operator that is registered, with every backend of its own kernels."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import numpy as np
import torch
import torch.utils._pytree as pytree
from helpers import BF16, F32, Where, default_target, logits
from torch import Tensor

Operator = Any  # torch._ops.OpOverload


def registered(namespace: str) -> list[str]:
    """The names of all operators of a namespace, from torch's dispatcher: none can be forgotten."""
    start = f"{namespace}::"
    return sorted(name.removeprefix(start) for name in torch._C._dispatch_get_all_op_names() if name.startswith(start))


def opcheck(name: str, where: Where) -> None:
    """Schema, fake tensors (shapes, strides, dtypes), autograd registration, aot dispatch with dynamic shapes."""
    with (
        mock.patch.object(torch, "allclose", on_host(torch.allclose)),
        mock.patch.object(torch.testing, "assert_close", on_host(torch.testing.assert_close)),
    ):
        for arguments in samples(name, where):
            torch.library.opcheck(named(name, where), arguments)


def on_host(comparison: Callable[..., Any]) -> Callable[..., Any]:
    """The comparison of what its tensors hold, on the CPU: torch's own CUDA kernels need not run under an emulator of a GPU."""

    def compare(*tensors: Any, **options: Any) -> Any:
        return comparison(*pytree.tree_map_only(Tensor, lambda x: x.cpu(), tensors), **options)

    return compare


def named(name: str, where: Where) -> Operator:
    namespace = torch.ops.kdfast_triton if where.backend == "triton" else torch.ops.kdfast
    return getattr(namespace, name.partition(".")[0]).default


def samples(name: str, where: Where) -> Iterator[tuple[Any, ...]]:
    """Arguments for an operator, made from the names in its schema."""
    wanted = [a.name for a in named(name, where)._schema.arguments]
    family = next((loss for loss in ("kl_div_tau", "logit_huber", "kd_loss") if loss in name), "logit_mse")
    shapes, dtypes, reductions = ((4, 7), (2, 3, 33)), ((F32, F32), (BF16, F32)), (0, 1, 2, 3)
    if where.backend == "triton":
        # Each is compiled. Rows long enough that a forward fills their numbers (launch.py: forgetful), and of one dtype: what
        # lays out two of them is not on every emulator of a GPU.
        shapes, dtypes, reductions = ((2, 500),), ((F32, F32), (BF16, BF16)), (0, 2)
    for shape, pair, reduction, weighted in itertools.product(shapes, dtypes, reductions, (False, True)):
        if "forward_grad" in name and reduction == 0:
            continue  # one number a row has no single gradient
        s, t = logits("typical", shape, pair)
        rows, lead = int(np.prod(shape[:-1])), shape[:-1]
        common: dict[str, Any] = {
            "student": s,
            "teacher": t,
            "gradient": s,
            "grad_loss": torch.full(lead if reduction == 0 and "scale" not in name else (), 0.5),
            "row_weight": torch.linspace(0, 1, rows).reshape(lead) if weighted else None,
            "denominator": torch.tensor(3.0) if weighted and reduction == 2 else None,
            "divisor": 5.0 if not weighted and reduction == 3 else None,
            "reduction": reduction,
            "num_classes": shape[-1] - 2 if weighted else -1,
            "tau": 4.0,
            "teacher_tau": 4.0,
            "scale_by_tau_squared": True,
            "center": True,
            "tau_limit": weighted,
            "delta": 0.5,
            "smooth_l1": weighted,
            "target": default_target(lead, shape[-1] - 2),
            "alpha": 0.5,
            "soft": reduction % 3,
            "ignore_index": -100,
            "label_smoothing": 0.1,
            "for_backward": True,
            "for_student": True,
            "for_teacher": not weighted,
        }
        common = {key: where.put(x) for key, x in common.items()}
        if "row_stats" in wanted:
            forward = named(f"{family}_forward", where)
            common["row_stats"] = forward(*(common[a.name] for a in forward._schema.arguments))[-1]
        common["for_backward"] = not weighted
        yield tuple(common[a] for a in wanted)
