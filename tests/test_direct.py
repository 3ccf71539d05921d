"""Calls of one thread on the CPU pass torch's dispatcher by (csrc/direct.cpp): the same bits, seen by whoever watches, declined in time."""

import math
import re
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import kdfast
from kdfast import _C, _ops

TARGET = torch.tensor([1, 0, -100, 4])
LOSSES = {
    "kl_div_tau": lambda s, t, **options: kdfast.kl_div_tau(s, t, 3.0, **options),
    "kl_div_tau at tau = inf": lambda s, t, **options: kdfast.kl_div_tau(s, t, math.inf, **options),
    "logit_mse": kdfast.logit_mse,
    "logit_mse, centred": lambda s, t, **options: kdfast.logit_mse(s, t, center=True, **options),
    "logit_huber": kdfast.logit_huber,
    "kd_loss": lambda s, t, **options: kdfast.kd_loss(s, t, TARGET, label_smoothing=0.1, **options),
    "kd_loss, mse": lambda s, t, **options: kdfast.kd_loss(s, t, TARGET.int(), soft="mse", **options),
}


def logits(dtype: torch.dtype = torch.float32, k: int = 5) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return tuple((2 * torch.randn(4, k, generator=generator)).to(dtype) for _ in range(2))


class Watching(TorchFunctionMode):
    """With any mode on, calls take the operators."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("reduction", ["none", "sum", "mean", "batchmean"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("k", [5, 300])
def test_the_operators_bits(k: int, loss: str, dtype: torch.dtype, reduction: str):
    found = []
    for watched in (False, True):
        s, t = logits(dtype, k)
        s.requires_grad_()
        if watched:
            with Watching():
                value = LOSSES[loss](s, t, reduction=reduction)
        else:
            value = LOSSES[loss](s, t, reduction=reduction)
        with torch.no_grad():
            alone = LOSSES[loss](s, t, reduction=reduction)
        value.sum().backward()
        found.append((value.detach(), alone, s.grad))
    for direct, operator in zip(*found, strict=True):
        assert direct.dtype == operator.dtype
        assert torch.equal(direct, operator)


@pytest.mark.parametrize("teacher", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_mixed_dtypes(teacher: torch.dtype):
    s, t = logits()[0].bfloat16(), logits()[1].to(teacher)
    with Watching():
        operator = kdfast.kl_div_tau(s, t, 2.0)
    direct = kdfast.kl_div_tau(s, t, 2.0)
    assert direct.dtype == operator.dtype
    assert torch.equal(direct, operator)


def test_no_operator_is_called(monkeypatch: pytest.MonkeyPatch):
    def fail(*args):
        raise AssertionError("the dispatcher's way was taken")

    monkeypatch.setattr(_ops, "KL_DIV_TAU", _ops.KL_DIV_TAU._replace(forward=fail))
    s, t = logits()
    kdfast.kl_div_tau(s, t, 3.0)
    for declined in (
        lambda: kdfast.kl_div_tau(s, t, 3.0, row_weight=torch.ones(4)),
        lambda: kdfast.kl_div_tau(s, t, 3.0, denominator=2.0),
        lambda: kdfast.kl_div_tau(s, t, 3.0, num_classes=3),
        lambda: kdfast.kl_div_tau(s[:, :3], t[:, :3], 3.0),
        lambda: kdfast.kl_div_tau(torch._neg_view(s), t, 3.0),
        lambda: kdfast.kl_div_tau(torch.nn.Parameter(s, requires_grad=False), t, 3.0),
    ):
        with pytest.raises(AssertionError, match="dispatcher"):
            declined()


@pytest.mark.parametrize("rows", [400, 40000])
def test_a_call_worth_two_threads_is_direct_in_one(monkeypatch: pytest.MonkeyPatch, rows: int):
    called = []
    forward = _ops.KL_DIV_TAU.forward
    monkeypatch.setattr(_ops, "KL_DIV_TAU", _ops.KL_DIV_TAU._replace(forward=lambda *a: called.append(1) or forward(*a)))
    s, t = torch.randn(rows, 100), torch.randn(rows, 100)
    threads, losses = torch.get_num_threads(), []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            losses.append(kdfast.kl_div_tau(s, t, 3.0))
            assert len(called) == count - 1
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(*losses)


@pytest.mark.skipif(not Path("/sys/kernel/mm/transparent_hugepage").exists(), reason="the system has no huge pages")
@pytest.mark.parametrize("threads", [1, 2])  # past the dispatcher and through it
def test_a_large_gradient_asks_for_huge_pages(threads: int):
    """Fresh memory of small pages takes three times the loss's own time."""
    before = torch.get_num_threads()
    s, t = torch.randn(16, 1 << 20, requires_grad=True), torch.randn(16, 1 << 20)
    try:
        torch.set_num_threads(threads)
        (gradient,) = torch.autograd.grad(kdfast.kl_div_tau(s, t, 3.0), [s])
    finally:
        torch.set_num_threads(before)
    middle, inside, flags = gradient.data_ptr() + (32 << 20), False, ""
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if mapping := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            inside = int(mapping[1], 16) <= middle < int(mapping[2], 16)
        elif inside and line.startswith("VmFlags:"):
            flags = line
    assert "hg" in flags.split()


def test_a_negated_view():
    s, t = logits()
    assert torch.equal(kdfast.logit_mse(torch._neg_view(s), t), kdfast.logit_mse(-s, t))
    s.requires_grad_()
    kdfast.logit_mse(s, t).backward(torch._neg_view(torch.tensor(1.0)))
    backwards, s.grad = s.grad, None
    kdfast.logit_mse(s, t).backward()
    assert torch.equal(backwards, -s.grad)


def test_watchers_see_the_operators():
    class Seen(TorchDispatchMode):
        def __init__(self):
            super().__init__()
            self.names = set()

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            self.names.add(function.name())
            return function(*args, **(kwargs or {}))

    s, t = logits()
    s.requires_grad_()
    with Seen() as seen:
        kdfast.kl_div_tau(s, t).backward()
    assert {"kdfast::kl_div_tau_forward_grad", "kdfast::scale_gradient_inplace"} <= seen.names
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        kdfast.kl_div_tau(s, t).backward()
    names = {event.name for event in profile.events()}
    assert {"kdfast::kl_div_tau_forward_grad", "kdfast::scale_gradient_inplace"} <= names


def test_a_gradient_scaled_twice():
    s, t = logits()
    s.requires_grad_()
    loss = kdfast.kl_div_tau(s, t, 3.0)
    (loss * 3).backward(retain_graph=True)
    (loss * 3).backward()
    single = torch.autograd.grad(kdfast.kl_div_tau(s, t, 3.0), s)[0]
    assert torch.equal(s.grad, single * 3 + single * 3)
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_declined_with_nothing_written(dtype: torch.dtype):
    s, t = logits(dtype)
    marker = -7.0
    value, gradient = torch.tensor(marker), torch.full_like(s, marker)
    plain = ((value,), gradient, s, t, 3, 2.0, 2.0, True)
    wrong = {
        0: [(), (value, value), (value.double(),), (value.expand(2),), (torch.zeros(4),), [value], (3,), value],
        1: [gradient.double(), gradient[:, :4], gradient.t(), torch.zeros(5, 4, dtype=dtype), "gradient"],
        2: [s.t().contiguous(), s[:, :4], s.t(), s.int(), s.to("meta"), s.to_sparse(), s[0], None, s[:0], s[:, :0]],
        3: [t.t().contiguous(), t[:, :4], t[None], t.bool(), t.to("meta"), t.unsqueeze(0), 3.0],
        4: [4, -1, 0],  # 0: one value a row, which has no gradient in forward
    }
    for place, values in wrong.items():
        for argument in values:
            arguments = list(plain)
            arguments[place] = argument
            assert _C.kl_div_tau(*arguments) is False
    assert value == marker
    assert (gradient == marker).all()
    with pytest.raises(TypeError, match="arguments"):
        _C.kl_div_tau(*plain[:-1])
    with pytest.raises(TypeError):
        _C.kl_div_tau(*plain[:5], "2", 2.0, True)
    assert _C.kl_div_tau(*plain) is True
    assert value != marker
    assert (gradient != marker).all()


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("reduction", ["none", "sum"])
@pytest.mark.parametrize("requires_grad", [False, True])
def test_other_layouts_are_refused_by_name(reduction: str, requires_grad: bool):
    s, t = logits()
    for wrong in (torch.nested.nested_tensor([s[0], s[1]]), s.to_sparse(), s.to_mkldnn()):
        wrong = wrong.detach().requires_grad_(requires_grad)
        with pytest.raises(TypeError, match="student_logits must be a dense tensor"):
            kdfast.kl_div_tau(wrong, t, reduction=reduction)
        with pytest.raises(TypeError, match="teacher_logits must be a dense tensor"):
            kdfast.kl_div_tau(s.clone().requires_grad_(requires_grad), wrong.detach(), reduction=reduction)


def test_a_wrong_target_is_named():
    s, t = logits()
    for wrong in (5, -1):
        target = TARGET.clone()
        target[3] = wrong
        with pytest.raises(ValueError, match=rf"target must be from 0 to 4.*got {wrong} in row 3"):
            kdfast.kd_loss(s, t, target)
