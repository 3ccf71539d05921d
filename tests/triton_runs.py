"""What test_triton.py runs in processes of its own: under Triton's interpreter, through the emulator, and for the compiler alone.

python triton_runs.py interpreter | emulator COUNTS | compile CC
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import math
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import helpers as h
import numpy as np
import on_host
import operators
import pytest
import torch

import kdfast


def show(*what: object) -> None:
    print(*what, flush=True)


# ------------------------------------------------------------------------------------------------------------- interpreter


def round_to_nearest() -> None:
    """Triton's interpreter truncates a float32 to bfloat16, where every GPU rounds."""
    import triton.language as tl
    from triton.runtime import interpreter

    truncating = interpreter._convert_float

    def convert(value: np.ndarray, kind: tl.dtype, to: tl.dtype, mode: object) -> np.ndarray:
        if (kind, to) != (tl.float32, tl.bfloat16):
            return truncating(value, kind, to, mode)
        return torch.from_numpy(np.ascontiguousarray(value)).to(torch.bfloat16).view(torch.int16).numpy().view(np.uint16)

    interpreter._convert_float = convert


def interpret() -> None:
    round_to_nearest()
    where = h.Where("cpu", "triton")
    matrix(where, ((3, 2), (3, 10), (2, 1003)), ("fp32", "bf16", "fp16", "fp32-bf16", "bf16-fp32", "fp64"))
    for regime in h.REGIMES:
        for tau in h.TAUS:
            k = 5000 if tau in (0.05, 4.0) else 300  # the first goes through the online pass
            student, teacher = h.logits(regime, (2, k))
            truth = h.oracle("kl_div_tau", student, teacher, tau, reduction="none")
            h.check(where, "kl_div_tau", student, teacher, tau=tau, grads="st", reduction="none", truth=truth)
    online(where)
    options(where)
    both_gradients(where)
    specials(where)
    far_off(where, (3, 300, 5000, 20000))  # in a tile of rows, of one row, in blocks
    strides(where)
    agreement(where)
    hard_part(where)
    for which in (1, 2):
        with nth_tile(which):
            matrix(where, ((70, 10), (3, 300), (2, 9000)), ("fp32",))
    autotuning(where)
    gradcheck()
    compiled_graph()


def nth_tile(which: int) -> contextlib.AbstractContextManager:
    """All kernels with that one of their lists of tiles, or the last."""
    from kdfast.triton.launch import Call

    return mock.patch.object(Call, "tile", lambda self, tiles, *_: tiles[min(which, len(tiles) - 1)])


class Tuning:
    """Autotuning as on a GPU, with a timer that says what `times` has and runs what it is given."""

    def __init__(self, where: h.Where, **limits: int) -> None:
        self.where, self.limits = where, {"LEAST_ROWS": 1, "LEAST_PAIRS": 1, "MOST_ROWS": 2, "MOST_PAIRS": 1, **limits}

    def __enter__(self) -> Tuning:
        from kdfast.triton import autotune, launch

        def timer(call: Callable[[], object], quantiles: tuple[float, ...]) -> list[float]:
            call()
            self.asked += 1
            time = next(self.times)
            if isinstance(time, Exception):
                raise time
            return [time] * len(quantiles)

        def watched(*args: object) -> autotune.Tile:
            self.choice = choose(*args)
            return self.choice

        choose, self.remembered = launch.choose, {}
        driver = SimpleNamespace(active=SimpleNamespace(get_benchmarker=lambda: timer))
        self.patches = contextlib.ExitStack()
        self.patches.enter_context(
            mock.patch.multiple(autotune, ENABLED=True, driver=driver, _chosen=self.remembered, **self.limits)
        )
        self.patches.enter_context(mock.patch.object(launch, "choose", watched))
        self.patches.enter_context(mock.patch.object(torch.cuda, "is_current_stream_capturing", return_value=False))
        return self

    def __exit__(self, *error: object) -> None:
        self.patches.close()

    @contextlib.contextmanager
    def asks(self, count: int | None, times: Iterable[float | Exception] = ()) -> Iterator[None]:
        """How often the timer is asked (None: at least once), and its answers."""
        self.asked, self.times = 0, iter(times)
        yield
        assert self.asked == count or (count is None and self.asked > 0), self.asked


def autotuning(where: h.Where) -> None:
    """What is measured and when, and that nobody else sees it."""
    from triton.runtime.errors import OutOfResources

    from kdfast import _ops
    from kdfast.triton import autotune, launch

    student, teacher = h.logits("typical", (3, 40))
    tiles = launch.tiles_of_rows(64, 4)
    assert len(set(tiles)) == 3

    def run(**options: object) -> h.Result:
        return h.check(where, "kl_div_tau", student, teacher, **options)

    for times, fastest in (((3, 2, 1), 2), ((1, 2, 3), 0), ((2, 1, 3), 1)):
        with Tuning(where) as tuning:
            with tuning.asks(3, times):
                first = run()
            assert tuning.choice == tiles[fastest]
            with tuning.asks(0):  # it stays
                second = run()
                assert tuning.choice == tiles[fastest]
                run(row_weight=torch.tensor([1.0, 0, 2]), denominator=3.0)
            assert torch.equal(first.loss, second.loss) and torch.equal(first.student, second.student)
            with tuning.asks(3, (1, 2, 3)):
                run(grads="")  # computes something else
            student, teacher = student.bfloat16(), teacher.bfloat16()
            with tuning.asks(3, (1, 2, 3)):
                run()
            student, teacher = h.logits("typical", (3, 40))
    # Every kernel, and gradients in place of the logits: what is measured reads what the call reads and writes nothing of it.
    for k, pair in ((40, "fp32"), (5000, "bf16")):
        student, teacher = h.logits("typical", (3, k), h.PAIRS[pair])
        for loss in ("kl_div_tau", "logit_mse", "logit_huber", "kd_loss"):
            for grads in ("", "s", "st"):
                with Tuning(where) as tuning:
                    with tuning.asks(None, itertools.count(0, -1)):
                        h.check(where, loss, student, teacher, grads=grads)
                    with tuning.asks(0):
                        h.check(where, loss, student, teacher, grads=grads)
            with Tuning(where) as tuning, tuning.asks(None, itertools.count(0, -1)):
                leaf = student.clone().requires_grad_()
                where.call(loss, leaf * 1, teacher, inplace_backward=True).backward()
                h.check_grad(leaf.grad, h.oracle(loss, student, teacher).student, student, (student, teacher))
    student, teacher = h.logits("typical", (3, 40))
    # A tile that the device cannot run is not taken; without the memory to measure in, the first is.
    with Tuning(where) as tuning:
        with tuning.asks(3, (2, OutOfResources(2, 1, "shared memory"), 1)):
            run()
        assert tuning.choice == tiles[2]
    with Tuning(where) as tuning:
        with tuning.asks(2, (2, torch.OutOfMemoryError("scratch"))):
            run()
        assert tuning.choice == tiles[0]
        with tuning.asks(0):
            run()
    with Tuning(where, LEAST_ROWS=4) as tuning:  # too few rows to tell: nothing is settled
        with tuning.asks(0):
            run()
        assert not tuning.remembered
        assert [autotune.rows_to_measure(rows, 40) for rows in (3, 4)] == [0, 2]
    # The first tile, which stays, where the host must not wait for the device.
    for module, name in ((torch.cuda, "is_current_stream_capturing"), (torch.compiler, "is_compiling")):
        with Tuning(where) as tuning, tuning.asks(0):
            with mock.patch.object(module, name, return_value=True):
                forward = _ops.on_triton(_ops.KL_DIV_TAU).forward_grad
                assert forward(student, teacher, None, None, None, 1, -1, 4.0, 4.0, True)[0].isfinite()
                assert tuning.choice == tiles[0]
            run()
            assert tuning.choice == tiles[0]
    # While torch.compile traces no kernel runs; the first run of what it made measures.
    with Tuning(where) as tuning, tuning.asks(3, (3, 2, 1)):

        def backend(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Callable:
            assert tuning.asked == 0
            return graph.forward

        torch.compile(kdfast.kl_div_tau, fullgraph=True, backend=backend)(student, teacher, 4.0, backend="triton")
        assert tuning.choice == tiles[2]
    # The switches.
    with Tuning(where) as tuning:
        torch.use_deterministic_algorithms(True)
        with tuning.asks(0):
            run()
        torch.use_deterministic_algorithms(False)
        assert tuning.choice == tiles[0] and not tuning.remembered
        with tuning.asks(3, (3, 2, 1)):
            run()
        with mock.patch.object(autotune, "ENABLED", False), tuning.asks(0):
            run()
            assert tuning.choice == tiles[0]
    assert not autotune.ENABLED  # in the interpreter
    with mock.patch.object(autotune.knobs.runtime, "interpret", False):
        for value, enabled in (("", True), ("1", True), ("0", False)):
            with mock.patch.dict(os.environ, KDFAST_TRITON_AUTOTUNE=value):
                assert autotune._enabled() is enabled
        with mock.patch.dict(os.environ, KDFAST_TRITON_AUTOTUNE="no"), pytest.raises(ValueError, match="TRITON_AUTOTUNE"):
            autotune._enabled()


def hard_part(where: h.Where) -> None:
    """What kd_loss adds: the mixture, targets, long rows whose target lies in a later block, parts."""
    for k in (17, 9000):
        student, teacher = h.logits("typical", (4 if k < 100 else 2, k))
        for soft, tau in (("kl", 4.0), ("kl", 1.0), ("kl", math.inf), ("mse", 1.0)):
            for alpha, smoothing in ((0.3, 0.1), (0.0, 0.1), (0.0, 0.0), (1.0, 0.1))[: None if k < 100 else 1]:
                mixture = {"soft": soft, "tau": tau, "alpha": alpha, "label_smoothing": smoothing}
                h.check(where, "kd_loss", student, teacher, **mixture)
                h.check(where, "kd_loss", student, teacher, grads="st", reduction="none", **mixture)
    for k in (100, 9000):
        target = torch.tensor([3, k - 1, -100, k // 2])
        # The target far above the others, and far below: the blocks' frame is another's.
        for depth in (15.0, 40.0, 120.0) if k < 1000 else (120.0,):
            student, teacher = h.logits("typical", (4, k))
            student = student.clamp(-3, 3)
            rows = torch.tensor([0, 1, 3])
            student[rows, target[rows]] = depth
            for soft in ("kl", "mse"):
                options = {"target": target, "soft": soft, "alpha": 0.0}
                h.check(where, "kd_loss", student, teacher, label_smoothing=0.1, **options)
                h.check(where, "kd_loss", -student, teacher, reduction="none", grads="st", **options)
        student, teacher = h.logits("typical", (4, k))
        h.check(where, "kd_loss", student, teacher, target=target.int(), grads="st")
        h.check(where, "kd_loss", student, teacher, target=target, ignore_index=3, row_weight=torch.tensor([1, 2, 0, 0.5]))
        h.check(where, "kd_loss", student, teacher, target=torch.full((4,), -100), alpha=0.5, grads="st")
        for spoilt in (student, teacher):  # rows that are masked, or ignored at alpha = 0, may hold anything
            spoilt[2, 1] = math.nan
            h.check(where, "kd_loss", student, teacher, target=target, row_weight=torch.tensor([1.0, 1, 0, 1]), grads="st")
            h.check(where, "kd_loss", student, teacher, target=target, alpha=0.0, grads="st", reduction="none")
        for soft in ("kl", "mse"):
            student, teacher = (x.double() for x in h.logits("typical", (4, k)))
            weight = torch.tensor([1.0, 0.5, 2, 0])
            parts = where.call("kd_loss", student, teacher, soft=soft, alpha=0.3, row_weight=weight, return_parts=True)
            for part, alpha in zip(parts, (0.3, 0.0, 1.0), strict=True):
                truth = h.oracle("kd_loss", student, teacher, 4.0, soft=soft, alpha=alpha, row_weight=weight)
                h.check_loss(part, truth, (student, teacher))
            student[1, k // 2], teacher[3, 1] = math.nan, math.nan
            for grads in ("s", "st"):
                got = where.run("kd_loss", student, teacher, target=target, soft=soft, grads=grads, reduction="none")
                assert got.loss.isnan().tolist() == got.student.isnan().any(-1).tolist() == [False, True, False, True]
        student, teacher = h.logits("typical", (4, k))
        student[:, 1] = teacher[:, 1] = -h.INF
        for tau in (1.0, 4.0):
            h.check(where, "kd_loss", student, teacher, target=target, tau=tau, grads="st", reduction="none")
        got = where.run("kd_loss", student, teacher, target=torch.ones_like(target), alpha=0.0, reduction="none")
        assert (got.loss == h.INF).all()
    outside(where)


def outside(where: h.Where) -> None:
    """A target that is no class makes its own row NaN; no memory is read for it (an emulator would see it)."""
    from kdfast import _ops

    for k in (20, 9000):
        student, teacher = (where.put(x) for x in h.logits("typical", (5, k)))
        target = where.put(torch.tensor([0, k, -1, 10**12, k - 1]))
        for soft in (0, 1):
            call = (student, teacher, None, None, None, 0, -1, target, 4.0, 0.5, soft, -100, 0.1)
            loss, hard, values, stats = _ops.on_triton(_ops.KD_LOSS).forward(*call, True)
            one = where.put(torch.ones(5))
            gradient, _ = _ops.on_triton(_ops.KD_LOSS).backward(one, student, teacher, stats, *call[2:], True, False)
            assert loss.cpu().isnan().tolist() == hard.cpu().isnan().tolist() == [False, True, True, True, False]
            assert values.cpu().isfinite().all()
            assert gradient.cpu().isnan().all(-1).tolist() == [False, True, True, True, False]
            assert gradient.cpu()[[0, 4]].isfinite().all()


def matrix(where: h.Where, shapes: tuple, pairs: tuple[str, ...]) -> None:
    """Losses, dtypes and which gradients are wanted; the student's alone is written by the forward."""
    for shape in shapes:
        for pair in pairs:
            student, teacher = h.logits("typical", shape, h.PAIRS[pair])
            for loss, extra in (
                ("kl_div_tau", {"tau": 4.0}),
                ("kl_div_tau", {"tau": math.inf}),
                ("logit_mse", {}),
                ("logit_mse", {"center": True}),
                ("logit_huber", {"delta": 0.7}),
                ("logit_huber", {"kind": "smooth_l1", "center": True}),
                ("kd_loss", {"tau": 4.0}),
                ("kd_loss", {"soft": "mse", "label_smoothing": 0.1, "alpha": 0.4}),
            ):
                for grads in ("s", "st", ""):
                    h.check(where, loss, student, teacher, grads=grads, **extra)


def online(where: h.Where) -> None:
    """Rows whose blocks do not resemble each other, which is what merging them must survive."""
    rng = np.random.default_rng(1)
    k = 9000
    step = np.where(np.arange(k) < 4096, -60.0, 0.0)  # the first block has no weight to speak of
    draws = {"late peak": step, "early peak": step[::-1].copy(), "slope": np.linspace(-30, 30, k), "flat": np.zeros(k)}
    for shape in draws.values():
        teacher = torch.from_numpy(shape + rng.standard_normal((2, k))).float()
        for noise in (1e-3, 0.3, 8.0):
            student = teacher + torch.from_numpy(rng.standard_normal((2, k)) * noise).float()
            for tau in (0.05, 1.0, 50.0):
                truth = h.oracle("kl_div_tau", student, teacher, tau, reduction="none")
                got = where.run("kl_div_tau", student, teacher, tau=tau, reduction="none")
                h.check_loss(got.loss, truth, (student, teacher))
                h.check_grad(got.student, truth.student, student, (student, teacher))
    student, teacher = h.logits("offset", (2, k))
    for kind in ("pseudo", "smooth_l1"):
        h.check(where, "logit_huber", student, teacher, kind=kind, center=True, grads="st", reduction="none")
    student, teacher = h.logits("offset", (1, 17000), h.PAIRS["bf16"])  # too long for one tile; both its reads in one program
    for loss, extra in (("logit_mse", {"center": True}), ("logit_huber", {"center": True}), ("kd_loss", {"soft": "mse"})):
        h.check(where, loss, student, teacher, **extra)
    masked = torch.from_numpy(rng.standard_normal((2, k))).float()
    masked[0, :4096] = -h.INF  # a block without any class of the teacher, where the student has some
    student = torch.from_numpy(rng.standard_normal((2, k))).float()
    student[0, :4096] -= 12.0
    h.check(where, "kl_div_tau", student, masked, tau=2.0, grads="st", reduction="none")


def options(where: h.Where) -> None:
    student, teacher = h.logits("typical", (3, 2, 40))
    weights = torch.tensor([[1, 0], [0.5, 2], [1, 1]])
    for loss in ("kl_div_tau", "logit_mse", "logit_huber", "kd_loss"):
        for reduction in ("none", "sum", "mean", "batchmean"):
            for weight in (None, weights, weights > 0.7, weights.bfloat16(), weights.double()):
                for grads in ("s", "st"):
                    h.check(
                        where,
                        loss,
                        student,
                        teacher,
                        reduction=reduction,
                        row_weight=weight,
                        grads=grads,
                        grad_output=0.7,
                        num_classes=37,
                    )
        for denominator in (7.5, torch.tensor(7.5), torch.tensor(7), torch.tensor(7.5, dtype=torch.bfloat16)):
            h.check(where, loss, student, teacher, denominator=denominator, grads="st", reduction="sum")
            h.check(where, loss, student, teacher, denominator=denominator, row_weight=weights)
        h.check(where, loss, student, teacher, row_weight=torch.zeros(3, 2), reduction="mean")
        h.check(where, loss, student[..., :30], teacher, num_classes=20, grads="st")
        none = torch.zeros(0, 5, requires_grad=True)
        assert where.call(loss, none, none.detach(), reduction="sum").item() == 0
        assert math.isnan(where.call(loss, none, none.detach(), reduction="mean").item())
    for delta in (1e-15, 1e-3, 1.0, 300.0, 1e15):
        for kind in ("pseudo", "smooth_l1"):
            h.check(where, "logit_huber", student, teacher, delta=delta, kind=kind, grads="st", reduction="none")
    for tau, teacher_tau in ((3.0, 1.5), (1.0, 50.0), (20.0, 0.3)):
        h.check(where, "kl_div_tau", student, teacher, tau=tau, teacher_tau=teacher_tau, grads="st")
    h.check(where, "kl_div_tau", student[..., :1], teacher[..., :1], tau=3.0, teacher_tau=1.5, grads="st")
    h.check(where, "kl_div_tau", student, teacher, tau=3.0, scale_by_tau_squared=False)


def both_gradients(where: h.Where) -> None:
    """Written by the forward, and asked for one by one, repeatedly, in any order."""
    student, teacher = h.logits("typical", (3, 40), (torch.float32, torch.bfloat16))
    long = h.logits("typical", (1, 40_000))  # its rows are read again, after a first kernel
    for loss, (s, t) in itertools.product(("kl_div_tau", "logit_mse", "logit_huber", "kd_loss"), ((student, teacher), long)):
        truth = h.oracle(loss, s, t, grad_output=3.0)
        leaves = [x.clone().requires_grad_() for x in (s, t)]
        value = where.call(loss, *leaves)
        assert len(value.grad_fn.saved_tensors) == 7
        up = torch.tensor(3.0)
        for wanted in ((0,), (1,), (0, 1), (1, 0)):
            got = torch.autograd.grad(value, [leaves[i] for i in wanted], up, retain_graph=wanted != (1, 0))
            for i, gradient in zip(wanted, got, strict=True):
                want = (truth.student, truth.teacher)[i]
                h.check_grad(gradient, want, (s, t)[i], (s, t), stored=3.0)
    for dtypes in (
        (torch.float16, torch.bfloat16),
        (torch.bfloat16, torch.float16),
    ):  # a small gradient of float16 is not stored
        leaves = [x.clone().requires_grad_() for x in h.logits("typical", (3, 40), dtypes)]
        value = where.call("kl_div_tau", *leaves)
        assert value.grad_fn.saved_tensors[-1].shape == (3, 9)
        got = torch.autograd.grad(value * 2.0**-20, leaves)
        assert all(g.float().abs().max() > 0 for g in got)


def specials(where: h.Where) -> None:
    for k in (12, 4600):
        student, teacher = h.logits("typical", (6, k))
        student[0, 3] = teacher[0, 3] = -h.INF
        teacher[1, 5] = -h.INF
        student[2, 1] = -h.INF  # the loss is infinite
        student[3, 2] = math.nan
        teacher[4, k - 1] = math.nan
        for tau in (0.5, 4.0):
            h.check(where, "kl_div_tau", student, teacher, tau=tau, grads="st", reduction="none")
            h.check(where, "kl_div_tau", student, teacher, tau=tau, row_weight=torch.tensor([1.0, 1, 0, 0, 0, 1]))
        both = student[:1], teacher[:1]
        for loss, extra in (
            ("logit_mse", {}),
            ("logit_mse", {"center": True}),
            ("kl_div_tau", {"tau": math.inf}),
            ("logit_huber", {}),
            ("logit_huber", {"kind": "smooth_l1"}),
            ("logit_huber", {"center": True}),
        ):
            h.check(where, loss, *both, grads="st", **extra)
            got = where.run(loss, student, teacher, grads="", reduction="none", **extra).loss
            assert got[2] == h.INF and got[3:5].isnan().all() and got[[0, 5]].isfinite().all(), (loss, extra, got)
        # a class of vanishing weight in the teacher, at -inf in the student; a student without any class
        student, teacher = torch.zeros(2, k), torch.zeros(2, k)
        teacher[0, 3] = -1e4
        student[0, 3] = -h.INF
        student[1] = -h.INF
        assert (where.run("kl_div_tau", student, teacher, grads="", reduction="none").loss == h.INF).all()
        # a class masked with the lowest finite number, on one side or both
        student, teacher = h.logits("typical", (3, k))
        lowest = torch.finfo(torch.float32).min
        teacher[0, 1] = student[1, 2] = teacher[1, 2] = teacher[2, k - 1] = lowest
        for options in ({"tau": 0.5}, {"tau": 4.0}, {"tau": 2.0, "teacher_tau": 1.0}):
            h.check(where, "kl_div_tau", student, teacher, grads="st", reduction="none", **options)


def far_off(where: h.Where, widths: tuple[int, ...]) -> None:
    """Student and teacher agree but for a class far off, beside one class that has the mass, or several; each row by itself."""
    several = (
        ((0, 0, -8), (0, 0, -2000)), ((0, -0.1, -8), (-0.1, 0, -2000)), ((0, -14, -4.6), (0, -20000, -4.6001)),
        ((0, -2, -2), (0, -2.3, -900)), ((0, -0.847, -60), (0, -600, -60)), ((0, -3, -60), (0, -6000, -60)),
    )  # fmt: skip
    for k, tau in itertools.product(widths, (0.05, 1.0)):
        if k > 1000 and tau == 1.0:
            continue
        one = h.with_a_class_far_off(tau)
        more = [torch.tensor([row[side] for row in several]) * tau for side in (1, 0)]
        rows = [*zip(*one, strict=True), *zip(*more, strict=True)]
        for student, teacher in rows[:: max(1, k // 3000)]:
            at = (torch.arange(3) * 2503 + k // 2) % k  # in a block each, of a long row
            row = torch.full((2, 1, k), -90.0 * tau)
            row[0, 0, at], row[1, 0, at] = student, teacher
            for grads, reduction in (("s", "sum"), ("st", "sum"), ("st", "none")):
                h.check(where, "kl_div_tau", *row, tau=tau, grads=grads, reduction=reduction)
            h.check(where, "kl_div_tau", row[0] + 8.0 * tau, row[1], tau=tau)
            h.check(where, "kd_loss", *row, tau=tau, alpha=1.0)


def strides(where: h.Where) -> None:
    student, teacher = h.logits("typical", (3, 4, 20))
    for loss in ("kl_div_tau", "logit_mse", "logit_huber", "kd_loss"):
        h.check(where, loss, student, teacher, grads="st", view=lambda x: x[:, :-1])
        h.check(where, loss, student, teacher, grads="st", view=lambda x: x.transpose(0, 1))
        h.check(where, loss, student, teacher, grads="s", view=lambda x: x[..., 1:-3])
        h.check(where, loss, student, teacher[:, :1], teacher_view=lambda x: x.expand(3, 4, 20))
        for dims in (6, 7):  # leading dimensions that do not merge; seven are copied
            every_other = lambda x: x[(slice(None, None, 2),) * (x.dim() - 1)]  # noqa: E731
            h.check(where, loss, *h.logits("typical", (3,) * dims + (8,)), grads="st", view=every_other)
        for view in (lambda x: x * 1, lambda x: (x * 1)[:, :-1]):
            leaf = student.clone().requires_grad_()
            where.call(loss, view(leaf), view(teacher), inplace_backward=True).backward()
            plain = student.clone().requires_grad_()
            where.call(loss, view(plain), view(teacher)).backward()
            assert h.relative_l2(leaf.grad.numpy(), plain.grad.numpy()) < 1e-6


def agreement(where: h.Where) -> None:
    """Triton and C++ on random inputs, each at most a budget from the truth."""
    from hypothesis import given, settings
    from hypothesis import strategies as st

    @settings(max_examples=60, deadline=None, derandomize=True, database=None)
    @given(
        rows=st.integers(1, 3), k=st.integers(1, 70), tau=st.sampled_from((0.05, 0.3, 1.0, 4.0, 20.0, 1e3, 1e6, math.inf)),
        spread=st.floats(0, 8), noise=st.floats(1e-2, 4), pair=st.sampled_from(tuple(h.PAIRS)), seed=st.integers(0, 1000),
        loss=st.sampled_from(("kl_div_tau", "logit_mse", "logit_huber", "kd_loss")), masked=st.booleans(), weighted=st.booleans(),
    )  # fmt: skip
    def agree(
        rows: int,
        k: int,
        tau: float,
        spread: float,
        noise: float,
        pair: str,
        seed: int,
        loss: str,
        masked: bool,
        weighted: bool,
    ) -> None:
        rng = np.random.default_rng(seed)
        teacher = torch.from_numpy(rng.standard_normal((rows, k)) * spread)
        student = (teacher + torch.from_numpy(rng.standard_normal((rows, k)) * noise)).to(h.PAIRS[pair][0])
        teacher = teacher.to(h.PAIRS[pair][1])
        if masked and k > 3:
            student[:, k // 2] = teacher[:, k // 2] = -h.INF
        options = {"tau": tau} if loss == "kl_div_tau" else {"center": k > 20}
        if loss == "kd_loss":  # no smoothing of labels over masked classes
            options = {"tau": tau, "soft": ("kl", "mse")[seed % 2], "alpha": (0.0, 0.3, 0.9, 1.0)[seed % 4]}
            options["target"] = torch.from_numpy(rng.integers(0, max(1, k // 2), rows))
        options |= {"kind": ("pseudo", "smooth_l1")[seed % 2]} if loss == "logit_huber" else {}
        options |= {"row_weight": torch.from_numpy(rng.random(rows))} if weighted else {}
        truth = h.oracle(loss, student, teacher, **options)
        ours = where.run(loss, student, teacher, grads="st", **options)
        theirs = h.Where("cpu", "cpp").run(loss, student, teacher, grads="st", **options)
        kind = h.arithmetic(student, teacher)
        for name, want in (("student", truth.student), ("teacher", truth.teacher)):
            a, b = (h.to_numpy(getattr(got, name)) for got in (ours, theirs))
            dtype = getattr(ours, name).dtype
            rounding = 2 * h.rounding_error(want, dtype) if dtype != kind else 0
            apart = h.relative_l2(a, b, h.FLOOR[kind])
            assert apart <= 2 * h.GRAD_BUDGET[kind] + rounding, (name, apart)
        apart = h.relative(abs(float(ours.loss) - float(theirs.loss)), truth.size, h.FLOOR[kind])
        assert apart <= 2 * h.LOSS_BUDGET[kind], apart

    agree()


def gradcheck() -> None:
    student, teacher = (x.requires_grad_() for x in h.logits("typical", (2, 5), h.PAIRS["fp64"]))
    weight = torch.tensor([0.5, 2.0])
    for tau in (0.7, 4.0, math.inf):
        for options in ({}, {"reduction": "none"}, {"row_weight": weight, "reduction": "mean"}):
            call = lambda s, t, tau=tau, o=options: kdfast.kl_div_tau(s, t, tau, backend="triton", **o)  # noqa: E731
            assert torch.autograd.gradcheck(call, (student, teacher))
    for center in (False, True):
        call = lambda s, t, c=center: kdfast.logit_mse(s, t, center=c, backend="triton")  # noqa: E731
        assert torch.autograd.gradcheck(call, (student, teacher))
        for kind in ("pseudo", "smooth_l1"):
            call = lambda s, t, o=(0.7, kind, center): kdfast.logit_huber(  # noqa: E731
                s, t, o[0], kind=o[1], center=o[2], backend="triton"
            )
            assert torch.autograd.gradcheck(call, (student, teacher))
    assert torch.autograd.gradgradcheck(lambda s, t: kdfast.kl_div_tau(s, t, 2.0, backend="triton"), (student, teacher))
    student, teacher = (x.detach()[:, :3].clone().requires_grad_() for x in (student, teacher))
    for soft, tau, alpha, reduction in (
        ("kl", 1.0, 0.4, "none"), ("kl", 3.0, 0.0, "mean"), ("mse", 1.0, 0.4, "mean"), ("kl", math.inf, 0.7, "none"),
    ):  # fmt: skip
        call = lambda s, t, o=(soft, tau, alpha, reduction): kdfast.kd_loss(  # noqa: E731
            s, t, torch.tensor([1, 2]), soft=o[0], tau=o[1], alpha=o[2], reduction=o[3], label_smoothing=0.1,
            row_weight=weight, backend="triton",
        )  # fmt: skip
        assert torch.autograd.gradcheck(call, (student, teacher))
    call = lambda s, t: kdfast.kd_loss(s, t, torch.tensor([1, -100]), tau=2.0, backend="triton")  # noqa: E731
    assert torch.autograd.gradgradcheck(call, (student, teacher))


def compiled_graph() -> None:
    student, teacher = h.logits("typical", (3, 300))  # a shorter row's statistics are not filled: its backward makes them anew
    target = torch.tensor([1, -100, 299])
    for (loss, extra), sides in itertools.product(((kdfast.kl_div_tau, ()), (kdfast.kd_loss, (target,))), (1, 2)):
        grads = []
        for call in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
            leaves = [x.clone().requires_grad_(i < sides) for i, x in enumerate((student, teacher))]
            call(*leaves, *extra, tau=4.0, backend="triton").backward()
            grads.append([leaf.grad for leaf in leaves[:sides]])
        assert all(torch.equal(*pair) for pair in zip(*grads, strict=True))
    options = (None, None, None, 2, -1)
    for loss, extra, numbers in (
        ("kl_div_tau", (4.0, 4.0, True), 9),
        ("kd_loss", (target, 4.0, 0.9, 0, -100, 0.1), 12),
        ("kd_loss", (target, 1.0, 0.9, 1, -100, 0.1), 7),
    ):
        of_kind = {
            kind: getattr(torch.ops.kdfast_triton, f"{loss}_{kind}").default
            for kind in ("forward", "forward_grad", "forward_grads", "backward")
        }
        for kind in ("forward", "forward_grad", "forward_grads"):
            torch.library.opcheck(of_kind[kind], (student, teacher, *options, *extra, *((True,) if kind == "forward" else ())))
        *_, stats = of_kind["forward"](student, teacher, *options, *extra, True)
        assert stats.shape == (3, numbers)
        assert of_kind["forward"](student, teacher, *options, *extra, False)[-1].shape == (3, 0)
        torch.library.opcheck(of_kind["backward"], (torch.ones(()), student, teacher, stats, *options, *extra, True, True))


# ---------------------------------------------------------------------------------------------------------------- emulator


def emulate(counts: Path) -> None:
    """Every launch is checked for memory errors, and leaves a line in `counts`. Prints which of its lines each case begins with."""
    where = h.Where("cuda", "triton")

    def begin(*case: object) -> None:
        show(json.dumps([*case, counts.read_text().count("\n") if counts.exists() else 0]))

    for k, rows in ((10, 256), (104, 40), (1000, 8), (1003, 8), (4096, 4), (16000, 2), (32000, 2), (128256, 1)):
        for pair in ("bf16", "fp32"):
            student, teacher = h.logits("typical", (rows, k), h.PAIRS[pair])
            truth = h.oracle("kl_div_tau", student, teacher, 4.0, reduction="mean")
            for grads in ("", "s", "st") if k < 100_000 else ("s",):
                begin(k, pair, rows * k, grads)
                h.check(where, "kl_div_tau", student, teacher, tau=4.0, reduction="mean", grads=grads, truth=truth)
            for which in (1, 2) if pair == "bf16" and k < 100_000 else ():
                with nth_tile(which):
                    for each in ("", "s", "st"):
                        begin(k, f"{pair}, tile {which}", rows * k, each)
                        h.check(where, "kl_div_tau", student, teacher, tau=4.0, reduction="mean", grads=each, truth=truth)
                    begin(k, f"{pair}, tile {which}", rows * k, "others")
                    h.check(where, "kd_loss", student, teacher, label_smoothing=0.1)
                    h.check(where, "logit_mse", student, teacher)
                    h.check(where, "logit_huber", student, teacher, center=True)
            for soft in ("kl", "mse"):
                begin(k, pair, rows * k, f"kd {soft}")
                h.check(where, "kd_loss", student, teacher, soft=soft, label_smoothing=0.1)
            begin(k, pair, rows * k, "mse")
            h.check(where, "logit_mse", student, teacher)
            begin(k, pair, rows * k, "centred")
            h.check(where, "logit_mse", student, teacher, center=True, grads="")
            begin(k, pair, rows * k, "huber")
            h.check(where, "logit_huber", student, teacher)
    begin(0, "", 0, "")
    student, teacher = h.logits("typical", (4, 3, 24), h.PAIRS["bf16"])
    weight = torch.rand(4, 3, generator=torch.Generator().manual_seed(0)) > 0.4
    for loss in ("kl_div_tau", "logit_mse", "logit_huber", "kd_loss"):
        h.check(where, loss, student, teacher, row_weight=weight, reduction="mean", num_classes=20, grads="st")
    h.check(where, "kl_div_tau", *h.logits("typical", (3, 5000)), tau=math.inf, grads="s")
    outside(where)
    far_off(where, (3, 5000))
    for soft in ("kl", "mse"):
        for k in (20, 5000, 20000):
            h.check(where, "kd_loss", *h.logits("typical", (3, k)), soft=soft, tau=1.0, grads="st", reduction="none")
    h.check(where, "logit_huber", *h.logits("typical", (3, 5000)), center=True, kind="smooth_l1", grads="st")
    h.check(where, "kl_div_tau", *h.logits("typical", (3, 900), h.PAIRS["fp64"]), tau=4.0, grads="s")
    tuned(where)
    derivatives(where)
    for name in operators.registered("kdfast_triton"):
        operators.opcheck(name, where)


def derivatives(where: h.Where) -> None:
    """First and second, the second by the reference. (Of shorter rows of float64, several warps hold the same weights, and Triton has
    each write them to the same bytes, which the emulator takes for a race.)"""
    student, teacher = (x.to("cuda").requires_grad_() for x in h.logits("typical", (1, 17), h.PAIRS["fp64"]))
    with on_host.where_needed():
        for loss, options in (
            ("kl_div_tau", {"tau": 2.0}),
            ("logit_mse", {"center": True}),
            ("logit_huber", {"delta": 0.7}),
            ("kd_loss", {"tau": 2.0, "label_smoothing": 0.1}),
            ("kd_loss", {"soft": "mse"}),
        ):
            call = functools.partial(where.call, loss, reduction="mean", row_weight=torch.tensor([0.5]), **options)
            for sides in ((student, teacher), (student, teacher.detach())):
                assert torch.autograd.gradcheck(call, sides) and torch.autograd.gradgradcheck(call, sides)


def tuned(where: h.Where) -> None:
    """Autotuning by Triton's timer, which here goes by a model: what is chosen is right, and chosen once."""
    from kdfast.triton import autotune

    with mock.patch.multiple(autotune, LEAST_ROWS=1, LEAST_PAIRS=1, MOST_ROWS=2):
        for k in (40, 5000):
            student, teacher = h.logits("typical", (4, k), h.PAIRS["bf16"])
            for loss in ("kl_div_tau", "logit_mse", "kd_loss"):
                for grads in ("", "s", "st"):
                    h.check(where, loss, student, teacher, grads=grads)
                    chosen = dict(autotune._chosen)
                    with mock.patch.object(autotune, "driver", None):  # nothing to measure with
                        h.check(where, loss, student, teacher, grads=grads)
                    assert autotune._chosen == chosen
    assert autotune._chosen


# ----------------------------------------------------------------------------------------------------------------- compile


def compile_for(capability: int) -> None:
    """Compiles every kernel for a GPU that is not there, by calling the operators with launches left out."""
    from triton.backends import nvidia
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    class Absent:
        get_current_device = staticmethod(lambda: 0)
        get_current_stream = staticmethod(lambda device=None: 0)
        get_current_target = staticmethod(lambda: GPUTarget("cuda", capability, 32))
        get_active_torch_device = staticmethod(lambda: torch.device("cpu"))
        map_python_to_cpp_type = staticmethod(lambda name: name)

    driver.set_active(Absent())
    run, compiled = JITFunction.run, {}

    def compile_only(self: JITFunction, *args: object, grid: object, warmup: bool, **options: object) -> object:
        kernel = run(self, *args, grid=grid, warmup=True, **options)
        compiled.setdefault(id(kernel), (self.__name__, kernel))
        return kernel

    JITFunction.run = compile_only
    cuobjdump = os.path.join(os.path.dirname(nvidia.__file__), "bin", "cuobjdump")
    from kdfast.triton import OPERATORS

    def report() -> Iterator[dict]:
        for name, kernel in compiled.values():
            with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
                file.write(kernel.asm["cubin"])
                file.flush()
                text = subprocess.run([cuobjdump, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
            registers, stack, local = map(int, re.search(r"REG:(\d+) STACK:(\d+).*LOCAL:(\d+)", text).groups())
            yield {"kernel": name, "registers": registers, "spilled": stack + local, "warps": kernel.metadata.num_warps}

    shapes = (10, 1000, 4096, 8192, 16000, 32000) if capability == 90 else (1000, 32000)
    for k in shapes:
        for dtype in (torch.bfloat16, torch.float32, torch.float64):
            student, teacher, one = torch.zeros(4, k, dtype=dtype), torch.zeros(4, k, dtype=dtype), torch.ones(())
            for which, (loss, extra, numbers) in itertools.product(
                range(3 if capability == 90 and dtype != torch.float64 else 1),
                (
                    ("kl_div_tau", (4.0, 4.0, True), 9),
                    ("logit_mse", (True, True), 4),
                    ("logit_huber", (1.0, False, True), 5),
                    ("kd_loss", (torch.zeros(4, dtype=torch.int64), 4.0, 0.9, 0, -100, 0.1), 12),
                    ("kd_loss", (torch.zeros(4, dtype=torch.int64), 4.0, 0.9, 1, -100, 0.1), 7),
                ),
            ):
                kd = loss == "kd_loss"  # of whose kernels the others' tell most
                if k == (4096 if kd else 8192):  # the longest row in one tile, with a hard part and without
                    continue
                if kd and dtype == torch.float64 and (capability != 90 or k not in (1000, 32000)):
                    continue
                rest = (None, None, None, 3, -1, *extra)
                stats = torch.zeros(4, numbers)
                with nth_tile(which):
                    if not kd:
                        OPERATORS[f"{loss}_forward"](student, teacher, *rest, True)
                    OPERATORS[f"{loss}_forward_grad"](student, teacher, *rest)
                    if capability == 90:
                        OPERATORS[f"{loss}_forward_grads"](student, teacher, *rest)
                    if k in (1000, 32000)[kd:] and capability == 90:
                        OPERATORS[f"{loss}_backward"](one, student, teacher, stats, *rest, True, True)
            OPERATORS["scale_gradient"](student, one)
            for row in report():
                show(json.dumps({"classes": k, "dtype": str(dtype), **row}))
            compiled.clear()


if __name__ == "__main__":
    torch.set_num_threads(1)
    kind, *rest = sys.argv[1:]
    {"interpreter": interpret, "emulator": lambda: emulate(Path(*rest)), "compile": lambda: compile_for(int(*rest))}[kind]()
    show("done")
    os._exit(0)  # the emulator's threads may still be there
