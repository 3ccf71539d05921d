"""Bad input: a ValueError or TypeError that names the argument, what came and what is taken; nothing is written.

Import problems and environment variables are tried in a process of their own.
"""

from __future__ import annotations

import math
import os
import subprocess
import sys
import types
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from helpers import logits
from torch import Tensor

import kdfast

NAN, INF = math.nan, math.inf


# The valid student and teacher of every case below, 4 x 7.
def S() -> Tensor:  # noqa: N802
    return logits("typical", (4, 7))[0]


def T() -> Tensor:  # noqa: N802
    return logits("typical", (4, 7))[1]


def case(kind: type[Exception], words: str, student: Any = S, teacher: Any = T, /, **options: Any) -> Any:
    """``words``: separated by blanks, all of them in the message (the argument's name, what came, what is taken)."""
    return pytest.param(kind, words, student, teacher, options, id=words.replace(" ", "-"))


def made(x: Any) -> Any:
    return x() if callable(x) else x


LOGITS = [
    case(TypeError, "student_logits Tensor list", [[1.0, 2.0]]),
    case(TypeError, "student_logits Tensor ndarray", np.zeros((4, 7), np.float32)),
    case(TypeError, "student_logits Tensor NoneType", lambda: None),
    case(TypeError, "teacher_logits Tensor float", S, 1.0),
    case(TypeError, "student_logits int64 float32", torch.zeros(4, 7, dtype=torch.int64)),
    case(TypeError, "teacher_logits int32 bfloat16", S, torch.zeros(4, 7, dtype=torch.int32)),
    case(TypeError, "teacher_logits bool", S, torch.zeros(4, 7, dtype=torch.bool)),
    case(TypeError, "student_logits complex64", torch.zeros(4, 7, dtype=torch.complex64)),
    case(TypeError, "teacher_logits float8_e4m3fn", S, lambda: T().to(torch.float8_e4m3fn)),
    case(TypeError, "student_logits sparse", lambda: S().to_sparse()),
    case(TypeError, "teacher_logits nested", S, lambda: torch.nested.nested_tensor([torch.ones(2, 7), torch.ones(2, 7)])),
    case(ValueError, "student_logits (...,_K) ()".replace("_", " "), torch.tensor(1.0), torch.tensor(1.0)),
    case(ValueError, "student_logits (7,)", lambda: S()[0], lambda: T()[0]),
    case(ValueError, "student_logits class (4, 0)", torch.zeros(4, 0), torch.zeros(4, 0)),
    case(ValueError, "student_logits teacher_logits (4, 7) (5, 7)", S, torch.zeros(5, 7)),
    case(ValueError, "student_logits teacher_logits (4, 7) (2, 2, 7)", S, torch.zeros(2, 2, 7)),
    case(ValueError, "teacher_logits (1, 7)", S, lambda: T()[:1]),  # no silent broadcasting
    case(ValueError, "student_logits teacher_logits 7 9 num_classes", S, torch.zeros(4, 9)),
    case(ValueError, "student_logits teacher_logits 7 1 num_classes", S, torch.zeros(4, 1)),
    case(ValueError, "teacher_logits device meta cpu", S, torch.zeros(4, 7, device="meta")),
]
SHARED = [
    case(ValueError, "reduction 'avg' 'mean'", reduction="avg"),
    case((ValueError, TypeError), "reduction None", reduction=None),
    case((ValueError, TypeError), "reduction 1", reduction=1),
    case((ValueError, TypeError), "reduction []", reduction=[]),
    case(ValueError, "backend 'cudnn' 'cpp'", backend="cudnn"),
    case((ValueError, TypeError), "backend None", backend=None),
    case((ValueError, TypeError), "backend []", backend=[]),
    case(ValueError, "num_classes 8 7", num_classes=8),
    case(ValueError, "num_classes 0", num_classes=0),
    case(ValueError, "num_classes -1", num_classes=-1),
    case(TypeError, "num_classes float int", num_classes=5.0),
    case(TypeError, "num_classes bool int", num_classes=True),
    case(TypeError, "num_classes numpy.bool int", num_classes=np.True_),
    case(ValueError, "num_classes int thousands", num_classes=10**5000),
    case(TypeError, "num_classes Tensor int", num_classes=torch.tensor(5)),
    case(ValueError, "num_classes 8 7 9", S, torch.zeros(4, 9), num_classes=8),
    case(TypeError, "row_weight list Tensor", row_weight=[1.0] * 4),
    case(TypeError, "row_weight int64 bool", row_weight=torch.ones(4, dtype=torch.int64)),
    case(TypeError, "row_weight float8_e5m2 float32", row_weight=lambda: torch.ones(4).to(torch.float8_e5m2)),
    case(TypeError, "row_weight complex64", row_weight=torch.ones(4, dtype=torch.complex64)),
    case(ValueError, "row_weight (4,) (3,)", row_weight=torch.ones(3)),
    case(ValueError, "row_weight (4,) (4, 1)", row_weight=torch.ones(4, 1)),
    case(ValueError, "row_weight (4,) (4, 7)", row_weight=torch.ones(4, 7)),
    case(ValueError, "row_weight (4,) ()", row_weight=torch.tensor(1.0)),
    case(ValueError, "row_weight requires grad", row_weight=lambda: torch.ones(4, requires_grad=True)),
    case(ValueError, "row_weight meta cpu", row_weight=torch.ones(4, device="meta")),
    case(TypeError, "row_weight dense sparse", row_weight=lambda: torch.ones(4).to_sparse()),
    case(TypeError, "denominator dense sparse", reduction="sum", denominator=lambda: torch.tensor(2.0).to_sparse()),
    case(ValueError, "denominator 1e-30 1e+30 1e-300", reduction="sum", denominator=1e-300),
    case(ValueError, "denominator 1e+30 1000000", reduction="sum", denominator=10**309),
    case(ValueError, "reduction array", reduction=np.array(["sum", "mean"])),
    case(ValueError, "backend array", backend=np.array(["cpp", "auto"])),
    case(TypeError, "inplace_backward True numpy.bool", inplace_backward=np.True_),
    case(TypeError, "inplace_backward True str", inplace_backward="no"),
    case(TypeError, "inplace_backward True Tensor", inplace_backward=torch.ones(2)),
    case(TypeError, "denominator str", reduction="sum", denominator="7"),
    case(TypeError, "denominator list", reduction="sum", denominator=[7.0]),
    case(ValueError, "denominator (1,)", reduction="sum", denominator=torch.ones(1)),
    case(ValueError, "denominator (4,)", reduction="sum", denominator=torch.ones(4)),
    case(TypeError, "denominator complex64", reduction="sum", denominator=torch.tensor(1j)),
    case(ValueError, "denominator nan", reduction="sum", denominator=NAN),
    case(ValueError, "denominator requires grad", reduction="sum", denominator=lambda: torch.tensor(2.0, requires_grad=True)),
    case(ValueError, "denominator meta cpu", reduction="sum", denominator=torch.tensor(2.0, device="meta")),
    case(ValueError, "inplace_backward leaf student_logits", lambda: S().requires_grad_(), inplace_backward=True),
]
TEMPERATURES = [
    case(ValueError, "tau 0", tau=0),
    case(ValueError, "tau -0.0", tau=-0.0),
    case(ValueError, "tau -1.5", tau=-1.5),
    case(ValueError, "tau nan", tau=NAN),
    case(ValueError, "tau -inf", tau=-INF),
    case(ValueError, "tau 1e+15 1e+16", tau=1e16),
    case(ValueError, "tau 1e+15 1000000", tau=10**309),
    case(ValueError, "tau 1e+15 int thousands", tau=10**5000),
    case(TypeError, "scale_by_tau_squared True Tensor", scale_by_tau_squared=torch.ones(3)),
    case(TypeError, "scale_by_tau_squared True int", scale_by_tau_squared=1),
    case(TypeError, "tau str", tau="4"),
    case(TypeError, "tau NoneType", tau=None),
    case(TypeError, "tau bool", tau=True),
    case(TypeError, "tau complex", tau=1j),
    case(TypeError, "tau list", tau=[1.0]),
    case(TypeError, "tau tensor number", tau=torch.tensor(4.0)),
    case(ValueError, "tau requires grad gradient", tau=lambda: torch.tensor(4.0, requires_grad=True)),
    case(ValueError, "teacher_tau 0", teacher_tau=0),
    case(ValueError, "teacher_tau nan", teacher_tau=NAN),
    case(TypeError, "teacher_tau str", teacher_tau="4"),
    case(ValueError, "teacher_tau requires grad", teacher_tau=lambda: torch.tensor(4.0, requires_grad=True)),
    case(ValueError, "teacher_tau tau inf 2", tau=INF, teacher_tau=2.0),
    case(ValueError, "scale_by_tau_squared tau inf", tau=INF, scale_by_tau_squared=False),
]

HUBER = [
    case(ValueError, "delta 0 1e-15", delta=0),
    case(ValueError, "delta -1.0", delta=-1.0),
    case(ValueError, "delta inf 1e+15", delta=INF),
    case(ValueError, "delta nan", delta=NAN),
    case(TypeError, "delta str", delta="1"),
    case(TypeError, "delta tensor number", delta=torch.tensor(1.0)),
    case(ValueError, "delta requires grad gradient", delta=lambda: torch.tensor(1.0, requires_grad=True)),
    case(ValueError, "kind 'huber' 'pseudo' 'smooth_l1'", kind="huber"),
    case(ValueError, "kind None", kind=None),
    case(ValueError, "kind array", kind=np.array(["pseudo", "smooth_l1"])),
    case(TypeError, "center True str", center="no"),
]


def refused(call: Any, kind: Any, words: str, student: Any, teacher: Any, options: dict[str, Any]) -> None:
    student, teacher, options = made(student), made(teacher), {k: made(v) for k, v in options.items()}
    tensors = [x for x in (student, teacher, *options.values()) if isinstance(x, Tensor) and x.device.type != "meta"]
    before = [x.detach().clone() for x in tensors]
    with pytest.raises(kind) as caught:
        call(student, teacher, **options)
    message = str(caught.value)
    for word in words.replace(", ", ",\0").split():
        assert word.replace("\0", " ") in message, f"{word.replace(chr(0), ' ')!r} is not in: {message}"
    assert "\n" not in message.strip() and len(message) < 400, message
    for a, b in zip(tensors, before, strict=True):
        same = (
            (a.detach() == b)
            if a.layout == torch.strided and not a.is_nested and "float8" not in str(a.dtype)
            else torch.ones(1)
        )
        assert bool(same.all()), "an input was written"


@pytest.mark.contract("wrong arguments: an error that names the argument")
@pytest.mark.parametrize("kind, words, student, teacher, options", LOGITS + SHARED)
@pytest.mark.parametrize("name", ["kl_div_tau", "logit_mse", "logit_huber"])
@pytest.mark.parametrize("backend", ["cpp", "reference"])
def test_refused(backend: str, name: str, kind: Any, words: str, student: Any, teacher: Any, options: dict[str, Any]) -> None:
    if backend == "reference" and options.get("inplace_backward") is True:
        words = "inplace_backward kernel 'reference'"
    refused(getattr(kdfast, name), kind, words, student, teacher, {"backend": backend} | options)


@pytest.mark.parametrize("kind, words, student, teacher, options", LOGITS)
def test_refused_at_the_limit_too(kind: Any, words: str, student: Any, teacher: Any, options: dict[str, Any]) -> None:
    """tau = inf takes another way through the code: the logits are checked there as well."""
    refused(kdfast.kl_div_tau, kind, words, student, teacher, options | {"tau": INF})


@pytest.mark.parametrize("kind, words, student, teacher, options", TEMPERATURES)
def test_refused_temperatures(kind: Any, words: str, student: Any, teacher: Any, options: dict[str, Any]) -> None:
    refused(kdfast.kl_div_tau, kind, words, student, teacher, options)


@pytest.mark.contract("wrong arguments: an error that names the argument", losses=("logit_huber",))
@pytest.mark.parametrize("kind, words, student, teacher, options", HUBER)
@pytest.mark.parametrize("backend", ["cpp", "reference"])
def test_refused_huber(backend: str, kind: Any, words: str, student: Any, teacher: Any, options: dict[str, Any]) -> None:
    refused(kdfast.logit_huber, kind, words, student, teacher, {"backend": backend} | options)


@pytest.mark.parametrize("kind, words, student, teacher, options", SHARED)
def test_modules_refuse_alike(kind: Any, words: str, student: Any, teacher: Any, options: dict[str, Any]) -> None:
    """A module may refuse when it is made or when it is called."""
    for cls in (kdfast.KLDivTau, kdfast.LogitMSE, kdfast.LogitHuber):
        forward = {k: v for k, v in options.items() if k in ("row_weight", "denominator")}
        own = {k: v for k, v in options.items() if k not in forward}
        refused(lambda s, t, c=cls, o=own, **kw: c(**o)(s, t, **kw), kind, words, student, teacher, forward)


@pytest.mark.parametrize("name", ["kl_div_tau", "logit_mse", "logit_huber"])
def test_unknown_options_are_pythons_error(name: str) -> None:
    with pytest.raises(TypeError, match="temperature"):
        getattr(kdfast, name)(S(), T(), temperature=4.0)
    with pytest.raises(TypeError, match="positional"):
        getattr(kdfast, name)(S(), T(), 4.0, 2.0)


@pytest.mark.parametrize("name", ["kl_div_tau", "logit_mse", "logit_huber"])
def test_overlapping_rows_are_refused_in_place(name: str) -> None:
    """Windows of one buffer: the rows share memory without any stride of 0."""
    base = torch.randn(40).requires_grad_() * 1
    windows = base.unfold(0, 7, 3)
    with pytest.raises((ValueError, RuntimeError), match="inplace_backward"):
        getattr(kdfast, name)(windows, torch.randn(windows.shape), inplace_backward=True)


@pytest.mark.parametrize("name", ["kl_div_tau", "logit_mse", "logit_huber"])
def test_a_teacher_in_the_students_memory_is_refused_in_place(name: str) -> None:
    """Its rows would be overwritten before they are read; logits beside each other are no such case."""
    loss = getattr(kdfast, name)
    base = torch.randn(12, 7).requires_grad_() * 1
    s = base[4:8]
    for teacher in (base.detach()[4:8], base.detach()[3:7], base.detach()[5:9], base.detach()[4:8, :]):
        with pytest.raises(ValueError, match=r"inplace_backward .*teacher_logits"):
            loss(s, teacher, inplace_backward=True)
    loss(s, base.detach()[8:].clone(), inplace_backward=True)
    loss(s, base.detach()[8:], inplace_backward=True)
    loss(s, base.detach()[:4], inplace_backward=True)


@pytest.mark.parametrize("name", ["kl_div_tau", "logit_mse", "logit_huber"])
def test_layouts_that_are_not_overwritten_are_refused_in_place(name: str) -> None:
    """When called, not during the backward: more independent strides than a kernel walks; torch's lazy minus."""
    many = (torch.randn(*[3] * 7, 5).requires_grad_() * 1)[(slice(None, None, 2),) * 7]
    with pytest.raises(ValueError, match=r"inplace_backward .*at most 6"):
        getattr(kdfast, name)(many, torch.zeros(many.shape), inplace_backward=True)
    minus = torch._neg_view(torch.randn(4, 7).requires_grad_() * 1)
    with pytest.raises(ValueError, match=r"inplace_backward .*resolve_neg"):
        getattr(kdfast, name)(minus, torch.zeros(4, 7), inplace_backward=True)


@pytest.mark.parametrize("name", ["kl_div_tau", "logit_mse", "logit_huber"])
def test_a_backend_that_is_not_there_says_how_to_get_it(name: str) -> None:
    """ "cpp" on a device without kernels, "triton" where it cannot run: what is missing, and what to do."""
    with pytest.raises((ValueError, RuntimeError, ImportError)) as caught:
        getattr(kdfast, name)(S(), T(), backend="triton")
    assert "triton" in str(caught.value) and "backend" in str(caught.value)


@pytest.mark.parametrize("name", ["kl_div_tau", "logit_mse", "logit_huber", "kd_loss"])
def test_a_gpu_without_kernels(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """ "auto" takes Triton's; without triton, plain torch, with one warning that names the loss. A backend asked for by name is refused."""
    from kdfast import _ops, functional

    loss = getattr(_ops, name.upper())._replace(has_cuda_kernels=False)
    monkeypatch.setattr(functional, "_warned", set())
    monkeypatch.setattr(functional, "_older_than_ours_cached", lambda device: None)
    on_gpu = types.SimpleNamespace(device=torch.device("cuda"), is_cpu=False)
    with pytest.raises(ValueError, match=f"cpp.*{name}"):
        functional._resolve_backend("cpp", on_gpu, loss)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        monkeypatch.setattr(functional, "HAS_TRITON", True)
        assert functional._resolve_backend("auto", on_gpu, loss) == "triton"
    monkeypatch.setattr(functional, "HAS_TRITON", False)
    with pytest.raises(ValueError, match=r"triton.*pip install"):
        functional._resolve_backend("triton", on_gpu, loss)
    with pytest.warns(UserWarning, match=f"{name}.*cuda.*plain torch"):
        assert functional._resolve_backend("auto", on_gpu, loss) == "reference"
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # once
        assert functional._resolve_backend("auto", on_gpu, loss) == "reference"


def test_a_gpu_that_is_too_old(monkeypatch: pytest.MonkeyPatch) -> None:
    """For CUDA C++ and for Triton alike: "auto" takes plain torch and says why, a backend asked for by name is refused."""
    from kdfast import _ops, functional

    loss = _ops.KL_DIV_TAU._replace(has_cuda_kernels=True)
    functional._older_than_ours_cached.cache_clear()
    monkeypatch.setattr(functional, "_warned", set())
    monkeypatch.setattr(functional, "HAS_TRITON", True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: types.SimpleNamespace(major=7, minor=5))
    on_gpu = types.SimpleNamespace(device=torch.device("cuda"), is_cpu=False)
    for backend in ("cpp", "triton"):
        with pytest.raises(ValueError, match=rf"{backend}.*capability 7\.5.*8\.0"):
            functional._resolve_backend(backend, on_gpu, loss)
    with pytest.warns(UserWarning, match=r"capability 7\.5.*plain torch"):
        assert functional._resolve_backend("auto", on_gpu, loss) == "reference"
    functional._older_than_ours_cached.cache_clear()
    monkeypatch.undo()  # (the compiler would look for that GPU)
    monkeypatch.setattr(functional, "_older_than_ours", lambda device: "too old")
    compiled = torch.compile(lambda x: (x, functional._too_old(torch.device("cuda"))), fullgraph=True, backend="eager")
    assert compiled(torch.zeros(1))[1] == "too old"


# ------------------------------------------------------------------------------------------------- import and
# environment


def python(code: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], env=os.environ | env, capture_output=True, text=True, timeout=120)


def last_line(done: subprocess.CompletedProcess[str]) -> str:
    return (done.stderr.strip().splitlines() or [""])[-1]


def test_missing_extension() -> None:
    done = python("import sys; sys.modules['kdfast._C'] = None; import kdfast")
    assert done.returncode and "ImportError" in last_line(done), done.stderr
    assert "kdfast._C" in done.stderr and "pip install" in last_line(done)


def test_sources_that_are_not_installed() -> None:
    done = python(
        "import importlib.metadata, torch\n"
        "def version(name): raise importlib.metadata.PackageNotFoundError(name)\n"
        "importlib.metadata.version = version\n"
        "import kdfast"
    )
    assert done.returncode and "ImportError: kdfast is not installed" in last_line(done), done.stderr
    assert "pip install" in last_line(done)


@pytest.mark.parametrize("version", ["2.4.1", "2.12.0+cu126", "1.13.1"])
def test_torch_that_is_too_old(version: str) -> None:
    code = f"import torch; torch.__version__ = type(torch.__version__)({version!r}); import kdfast"
    done = python(code)
    assert done.returncode and "ImportError" in last_line(done), done.stderr
    assert version in last_line(done) and "2.13" in last_line(done)


def test_torch_that_is_new_enough() -> None:
    for version in ("2.13.0", "2.14.1+cu130", "2.100.0", "3.0.0a0+git123"):  # compared as versions, not as strings
        done = python(f"import torch; torch.__version__ = type(torch.__version__)({version!r}); import kdfast")
        assert done.returncode == 0, done.stderr


SHOW = """
import torch, kdfast
from torch.profiler import profile
with profile() as p:
    print(kdfast.kl_div_tau(torch.ones(2, 3).cumsum(1), torch.zeros(2, 3)).item())
print(any(e.name.startswith("kdfast::") for e in p.events()))
"""


def test_environment_variable_for_the_backend() -> None:
    values = []
    for name, kernels in (("", True), ("auto", True), ("cpp", True), ("reference", False)):
        done = python(SHOW, KDFAST_BACKEND=name)
        value, used = done.stdout.split()
        values.append(float(value))
        assert used == str(kernels), (name, done.stdout, done.stderr)
    assert values[0] > 0 and max(values) - min(values) <= 1e-6 * max(values)
    done = python(SHOW, KDFAST_BACKEND="cuddn")
    assert done.returncode and "KDFAST_BACKEND" in last_line(done) and "cuddn" in last_line(done) and "cpp" in last_line(done)


def test_environment_variable_for_the_instruction_set() -> None:
    done = python(SHOW, KDFAST_CPU_ISA="mmx")
    assert done.returncode and "KDFAST_CPU_ISA" in done.stderr and "mmx" in done.stderr and "baseline" in done.stderr
