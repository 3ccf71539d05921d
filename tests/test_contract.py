"""What tracing may assume: the number of rows stays free, in torch.compile and in torch.export, on every way through the losses."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch._dynamo.testing
from helpers import check_grad, check_loss, logits, oracle
from torch import Tensor

import kdfast

BACKENDS = ("cpp", "reference")


class Calls(torch.nn.Module):
    def __init__(self, call: Callable[..., Tensor], backend: str) -> None:
        super().__init__()
        self.call, self.backend = call, backend

    def forward(self, s: Tensor, t: Tensor) -> Tensor:
        return self.call(s, t, backend=self.backend)


@pytest.mark.contract("`torch.export`, the batch left free")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("strict", [False, True], ids=["non-strict", "strict"])
def test_export_leaves_the_batch_free(loss: str, strict: bool, backend: str) -> None:
    rows = torch.export.Dim("rows", min=2, max=1000)
    shapes = ({0: rows}, {0: rows})
    module = Calls(getattr(kdfast, loss), backend)
    program = torch.export.export(module, logits("typical", (6, 7)), dynamic_shapes=shapes, strict=strict)
    for count in (2, 9):
        s, t = logits("typical", (count, 7))
        check_loss(program.module()(s, t), oracle(loss, s, t), (s, t))


@pytest.mark.contract("no recompilation when only the batch changes")
@pytest.mark.parametrize("grads", ["", "s", "st"])
@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_no_recompile_when_only_the_batch_changes(loss: str, reduction: str, grads: str) -> None:
    """Without a gradient, with the student's (a scalar's is written during the forward), with both (recomputed)."""
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    call = getattr(kdfast, loss)
    compiled = torch.compile(lambda s, t: call(s, t, reduction=reduction), fullgraph=True, backend=counter, dynamic=True)
    counts = []
    for rows in (4, 5, 9, 33):
        s, t = logits("typical", (rows, 7))
        s.requires_grad_("s" in grads)
        t.requires_grad_("t" in grads)
        value = compiled(s, t)
        truth = oracle(loss, s, t, reduction=reduction)
        check_loss(value.detach(), truth, (s, t))
        if grads:
            value.sum().backward()
            check_grad(s.grad, truth.student, s, (s, t))
        if "t" in grads:
            check_grad(t.grad, truth.teacher, t, (s, t))
        counts.append(counter.frame_count)
    assert counts[0] >= 1 and counts[-1] == counts[0], counts
