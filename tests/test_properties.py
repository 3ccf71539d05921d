"""Random problems over the whole argument space, judged by the same oracle and the same helper."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from helpers import BF16, F16, F32, F64, INF, Where, check, eager_errors, oracle
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

settings.register_profile("kdfast", deadline=None, derandomize=True, suppress_health_check=list(HealthCheck), print_blob=True)
settings.load_profile("kdfast")

DTYPES = st.sampled_from([F32, F32, BF16, F16, F64])
WIDTHS = st.one_of(st.integers(1, 40), st.sampled_from([63, 64, 65, 127, 128, 129, 255, 257, 511, 513, 1003]))


@dataclass
class Problem:
    """Drawn in full before anything is computed; its repr is enough to rebuild it."""

    loss: str
    shape: tuple[int, ...]
    dtypes: tuple[torch.dtype, torch.dtype]
    spread: float
    noise: float
    shift: float
    seed: int
    layout: str
    grads: str
    masked: str
    grad_output: float
    options: dict[str, Any] = field(default_factory=dict)


@st.composite
def problems(draw: st.DrawFn) -> Problem:
    loss = draw(st.sampled_from(["kl_div_tau", "kl_div_tau", "logit_mse", "logit_huber"]))
    lead = tuple(draw(st.lists(st.integers(1, 5), min_size=1, max_size=3)))
    k = draw(WIDTHS)
    reduction = draw(st.sampled_from(["none", "sum", "mean", "batchmean"]))
    options: dict[str, Any] = {"reduction": reduction}
    if loss == "kl_div_tau":
        options["tau"] = draw(st.one_of(st.just(INF), st.floats(math.log(0.05), math.log(1e6)).map(math.exp)))
        if options["tau"] < INF and draw(st.booleans()):
            options["teacher_tau"] = draw(st.floats(math.log(0.3), math.log(1e3)).map(math.exp))
        if options["tau"] < INF and draw(st.booleans()):
            options["scale_by_tau_squared"] = False
    else:
        options["center"] = draw(st.booleans())
    if loss == "logit_huber":
        options["delta"] = draw(st.sampled_from([0.01, 1.0, 30.0]))
        options["kind"] = draw(st.sampled_from(["pseudo", "smooth_l1"]))
    if k > 1 and draw(st.booleans()):
        options["num_classes"] = draw(st.integers(1, k))
    if reduction != "none" and draw(st.booleans()):
        options["denominator"] = draw(st.sampled_from([3, 0.37, torch.tensor(5), torch.tensor(1.7, dtype=F64)]))
    weight = draw(st.sampled_from([None, None, "bool", "float", "zero"]))
    if weight is not None:
        rng = np.random.default_rng(draw(st.integers(0, 99)))
        w = torch.tensor(rng.integers(0, 4, lead) / 2.0)
        options["row_weight"] = (
            w > 0.7 if weight == "bool" else (w * 0 if weight == "zero" else w.to(draw(st.sampled_from([F32, F64, BF16]))))
        )
    noise = draw(st.sampled_from([1e-4, 1.0, 10.0]))
    return Problem(
        loss,
        (*lead, k),
        (draw(DTYPES), draw(DTYPES)),
        spread=draw(st.sampled_from([0.1, 3.0, 15.0])),
        noise=noise,
        shift=draw(st.sampled_from([0.0, 0.0, 5.0])) if noise >= 1 else 0.0,  # with both, test_accuracy.py's "a constant"
        seed=draw(st.integers(0, 999)),
        layout=draw(st.sampled_from(["plain", "slice", "transpose", "reverse-lead", "class-first", "expand"])),
        grads=draw(st.sampled_from(["s", "t", "st"])),
        masked=draw(st.sampled_from(["no", "no", "both", "teacher", "student", "nan"])),
        grad_output=draw(st.sampled_from([1.0, 0.25, -3.0])),
        options=options,
    )


def build(p: Problem) -> tuple[Tensor, Tensor]:
    rng = np.random.default_rng(p.seed)
    t = torch.from_numpy(rng.standard_normal(p.shape) * p.spread).to(p.dtypes[1])
    s = (t.to(F64) + torch.from_numpy(rng.standard_normal(p.shape) * p.noise) + p.shift).to(p.dtypes[0])
    k = p.options.get("num_classes", p.shape[-1])
    off = torch.from_numpy(rng.random(p.shape) < 0.2)
    off[..., rng.integers(0, k)] = False  # no row is left without a class
    if p.masked in ("both", "teacher"):
        t[off] = -INF
    if p.masked in ("both", "student"):
        s[off & torch.from_numpy(rng.random(p.shape) < 0.3) if p.masked == "student" else off] = -INF
    if p.masked == "nan":
        s[torch.from_numpy(rng.random(p.shape) < 0.02)] = math.nan
    if "row_weight" in p.options:
        s[p.options["row_weight"] == 0] = math.nan  # must not matter
    if k < p.shape[-1]:
        s[..., k:] = math.nan
    return s, t


def arranged(x: Tensor, layout: str) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """A base tensor and a view of it with the values of ``x`` and the memory layout asked for."""
    if layout == "slice":
        base = torch.full((*x.shape[:-2], x.shape[-2] + 1, x.shape[-1] + 3), 7.0, dtype=x.dtype)
        cut = (..., slice(0, -1), slice(1, -2))
        base[cut] = x
        return base, lambda b: b[cut]
    if layout == "transpose" and x.dim() > 2:
        return x.transpose(0, 1).contiguous(), lambda b: b.transpose(0, 1)
    if layout == "reverse-lead":
        dims = (*reversed(range(x.dim() - 1)), x.dim() - 1)
        return x.permute(dims).contiguous(), lambda b: b.permute(dims)
    if layout == "class-first":
        return x.movedim(-1, 0).contiguous(), lambda b: b.movedim(0, -1)
    return x, lambda b: b


def judge(where: Where, p: Problem) -> None:
    s, t = build(p)
    base_s, view_s = arranged(s, p.layout)
    base_t, view_t = arranged(t, p.layout if p.seed % 2 else "plain")
    if p.layout == "expand":
        t = t[:1].expand(t.shape)
        base_t, view_t = t[:1].clone(), lambda b: b.expand(s.shape)
    lead = p.shape[:-1]
    up: Any = p.grad_output
    if p.options["reduction"] == "none":
        up = p.grad_output * torch.tensor(np.random.default_rng(p.seed).integers(1, 5, lead) / 4.0)
    truth = oracle(p.loss, s, t, grad_output=up, **p.options)
    # one small batch may hold nothing but rows that float32 cannot resolve (a KL of 1e-30 at tau = 0.05, two classes
    # whose differences cancel): there, twice the float32 eager error is as good as the design asks for
    try:
        theirs = eager_errors(p.loss, s, t, truth, grad_output=up, **p.options) if np.isfinite(truth.loss).all() else (0, 0, 0)
    except (RuntimeError, FloatingPointError):
        theirs = (0, 0, 0)
    allow = tuple(2 * e if math.isfinite(e) else 0.0 for e in theirs)
    check(
        where, p.loss, base_s, base_t, grads=p.grads, grad_output=up, view=view_s, teacher_view=view_t, truth=truth,
        allow=allow, **p.options,
    )  # fmt: skip


@settings(max_examples=600)
@given(p=problems())
def test_kernels(kernel: Where, p: Problem) -> None:
    assume(kernel.has(p.loss))
    judge(kernel, p)


@settings(max_examples=150)
@given(p=problems())
def test_reference(p: Problem) -> None:
    judge(Where("cpu", "reference"), p)


@settings(max_examples=150)
@given(p=problems())
def test_backends_agree_on_what_is_special(p: Problem) -> None:
    """NaN, inf and exact zeros stand in the same places whatever computes them."""
    assume(p.masked != "no")
    s, t = build(p)
    a, b = (Where("cpu", name).run(p.loss, s, t, grads=p.grads, **p.options) for name in ("cpp", "reference"))
    for x, y in ((a.loss, b.loss), (a.student, b.student), (a.teacher, b.teacher)):
        if x is not None and y is not None and not b.loss.isinf().any():
            assert torch.equal(x.isnan(), y.isnan()) and torch.equal(x.isinf(), y.isinf())
