"""What tracing may assume: the number of rows stays free, in torch.compile and in torch.export, on every way through the losses."""

from __future__ import annotations

from collections.abc import Callable

import contract
import pytest
import torch
import torch._dynamo.testing
from helpers import check_grad, check_loss, default_target, logits, oracle, target_of
from torch import Tensor

import kdfast

BACKENDS = ("cpp", "reference")


class Calls(torch.nn.Module):
    def __init__(self, call: Callable[..., Tensor], backend: str) -> None:
        super().__init__()
        self.call, self.backend = call, backend

    def forward(self, *tensors: Tensor) -> Tensor:
        return self.call(*tensors, backend=self.backend)


def arguments(loss: str, rows: int) -> tuple[Tensor, ...]:
    s, t = logits("typical", (rows, 7))
    return (s, t, *target_of(loss, default_target((rows,), 7)).values())


@pytest.mark.contract("`torch.export`, the batch left free")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("strict", [False, True], ids=["non-strict", "strict"])
def test_export_leaves_the_batch_free(loss: str, strict: bool, backend: str) -> None:
    rows = torch.export.Dim("rows", min=2, max=1000)
    tensors = arguments(loss, 6)
    module = Calls(getattr(kdfast, loss), backend)
    shapes = ({0: rows},) * len(tensors)
    program = torch.export.export(module, tensors, dynamic_shapes=(shapes,), strict=strict)
    for count in (2, 9):
        s, t, *target = arguments(loss, count)
        check_loss(program.module()(s, t, *target), oracle(loss, s, t), (s, t))


@pytest.mark.contract("`torch.export` of a training step")
@pytest.mark.parametrize("strict", [False, True], ids=["non-strict", "strict"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_export_keeps_the_gradient(loss: str, reduction: str, strict: bool) -> None:
    """An exported operator is its forward alone: beside another loss its gradient would be missing without a word."""
    s, t, *target = arguments(loss, 6)
    layer = torch.nn.Linear(7, 7)

    class Objective(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = layer

        def forward(self, x: Tensor, t: Tensor, *target: Tensor) -> Tensor:
            z = self.layer(x)
            return getattr(kdfast, loss)(z, t, *target, reduction=reduction).sum() + z.square().sum()

    program = torch.export.export(Objective(), (s, t, *target), strict=strict).module()
    gradients = []
    for model in (program, Objective()):
        model.zero_grad()
        model(s, t, *target).backward()
        gradients.append(dict(model.named_parameters())["layer.weight"].grad)
    torch.testing.assert_close(*gradients)


@pytest.mark.contract("no recompilation when only the batch changes")
@pytest.mark.parametrize(
    "backend, reduction, grads",
    [("cpp", reduction, grads) for reduction in ("none", "mean") for grads in ("", "s", "st")] + [("reference", "mean", "s")],
)
def test_no_recompile_when_only_the_batch_changes(loss: str, backend: str, reduction: str, grads: str) -> None:
    """Without a gradient, with the student's, with both (a scalar's are written during the forward)."""
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    call = getattr(kdfast, loss)
    compiled = torch.compile(
        lambda *tensors: call(*tensors, reduction=reduction, backend=backend), fullgraph=True, backend=counter, dynamic=True
    )
    counts = []
    for rows in (4, 5, 9, 33):
        s, t, *target = arguments(loss, rows)
        s.requires_grad_("s" in grads)
        t.requires_grad_("t" in grads)
        value = compiled(s, t, *target)
        truth = oracle(loss, s, t, reduction=reduction)
        check_loss(value.detach(), truth, (s, t))
        if grads:
            value.sum().backward()
            check_grad(s.grad, truth.student, s, (s, t))
        if "t" in grads:
            check_grad(t.grad, truth.teacher, t, (s, t))
        counts.append(counter.frame_count)
    assert counts[0] >= 1 and counts[-1] == counts[0], counts


# ------------------------------------------------------------------------------------------------------ docs/contract.md


def test_the_table_is_read_as_it_was_written() -> None:
    row, other = contract.ROWS[0], contract.ROWS[-1]
    cells = {contract.Cell(row, "kl_div_tau", "cpp"), contract.Cell(other, "kd_loss", "reference")}
    text = contract.render(cells, {row: ["test_autograd.py::test_gradcheck"]})
    assert contract.parse(text) == cells
    assert contract.parse("") == set()
    assert "[test_gradcheck](../tests/test_autograd.py)" in text and "CUDA" not in text.split("\n\n")[-1]


def test_a_table_that_says_anything_else_is_found() -> None:
    cells = {contract.Cell(row, "kl_div_tau", "cpp") for row in contract.ROWS[:3]}
    lost, gpu = contract.Cell(contract.ROWS[0], "kl_div_tau", "cpp"), contract.Cell(contract.ROWS[0], "kl_div_tau", "cuda")
    assert contract.differences(cells, cells) == []
    assert contract.differences(cells, cells - {lost}) == [f"ticked, but not proved: {', '.join(lost)}"]
    assert contract.differences(cells - {lost}, cells) == [f"proved, but not ticked: {', '.join(lost)}"]
    assert contract.differences(cells | {gpu}, cells) == []  # written where there is a GPU
    assert len(contract.differences(set(), cells)) == 3
