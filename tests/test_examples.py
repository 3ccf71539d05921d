"""The demo and the benchmarks run: toy sizes, so that they cannot rot."""

from __future__ import annotations

import csv
import dataclasses
import functools
import importlib
import itertools
import math
import os
from pathlib import Path
from types import ModuleType

import pytest
import torch

import kdfast  # noqa: F401  (before the repository's root comes to the front of the path)

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch):
    """Import a program of the repository; put the number of threads, which the programs set, back afterwards."""
    monkeypatch.syspath_prepend(str(ROOT))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)

    def import_program(name: str) -> ModuleType:
        return importlib.import_module(name)

    yield import_program
    torch.set_num_threads(threads)


def demo(load) -> ModuleType:
    for needed in ("sklearn", "matplotlib", "rich"):
        pytest.importorskip(needed, reason="the demo extra is not installed")
    return load("examples.digits")


def benchmark(load, name: str) -> ModuleType:
    pytest.importorskip("rich", reason="the bench extra is not installed")
    return load(f"benchmarks.{name}")


def test_demo_learns_prints_and_draws(load, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    digits = demo(load)
    picture = tmp_path / "new folder" / "digits.png"
    results = digits.main(["--quick", "--seeds", "1", "--epochs", "80", "--out", str(picture)])

    names = ["teacher", "cross-entropy", *(f"kl_div_tau, tau={tau}" for tau in (1, 4, 20, "inf")), "logit_mse"]
    assert list(results.accuracies) == names
    assert results.accuracies["teacher"][0] > 95
    assert all(values[0] > 50 for values in results.accuracies.values()), results.accuracies  # 10 is chance

    width, height = (int.from_bytes(picture.read_bytes()[at : at + 4], "big") for at in (16, 20))
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert width >= 1000
    assert height >= 400
    printed = capsys.readouterr().out
    assert all(name in printed for name in names)
    assert str(picture) in printed


def test_demo_repeats_itself(load):
    digits = demo(load)
    first, second = (digits.run(seeds=1, epochs=3, device=torch.device("cpu")) for _ in range(2))
    assert first.accuracies == second.accuracies
    assert torch.equal(first.student_logits, second.student_logits)


def test_demo_refuses_zero_seeds(load, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit):
        demo(load).main(["--seeds", "0"])
    assert "--seeds" in capsys.readouterr().err


def test_accuracy_benchmark(load, tmp_path: Path):
    accuracy = benchmark(load, "accuracy")
    out = tmp_path / "accuracy.csv"
    arguments = ["--classes", "1", "7", "--rows", "3", "--regimes", "typical", "near 1e-5", "--csv", str(out)]
    assert accuracy.main(arguments) == 0, "kdfast missed a budget"
    cases = len(accuracy.DTYPES) * 2 * 2 * (len(accuracy.TAUS) + 1)
    assert len(out.read_text().splitlines()) == 1 + cases


@pytest.mark.parametrize("tau", [0.3, 1.0, 4.0, math.inf])
def test_accuracy_oracle_agrees_with_float64_pytorch(load, tau: float):
    accuracy = benchmark(load, "accuracy")
    student, teacher = accuracy.logits(accuracy.REGIMES["typical"], rows=3, classes=11, seed=0)
    truth = accuracy.oracle(student, teacher, tau, rows_at_once=2)
    s, t = student.requires_grad_(), teacher.requires_grad_()
    limit = 0.5 * (s - t).var(-1, correction=0).mean()
    loss = limit if math.isinf(tau) else accuracy.eager(tau)(s, t)
    to_student, to_teacher = torch.autograd.grad(loss, (s, t))
    assert truth.loss == pytest.approx(loss.item(), rel=1e-12)
    torch.testing.assert_close(torch.from_numpy(truth.student), to_student, rtol=1e-10, atol=1e-14)
    torch.testing.assert_close(torch.from_numpy(truth.teacher), to_teacher, rtol=1e-10, atol=1e-14)


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


COLUMNS = [
    "loss",
    "pass",
    "shape",
    "dtype",
    "allocation",
    "threads",
    "provider",
    "version",
    "median_ms",
    "quartile1_ms",
    "quartile3_ms",
    "page_faults",
    "bytes",
    "gb_per_s",
    "percent_of_copy",
    "peak_bytes",
    "loss_error",
    "gradient_error",
    "wrong",
    "device",
    "machine",
]
TOY = ["--shapes", "3x5", "4x1000", "--dtypes", "float32", "--rounds", "1", "--taus", "1", "1000", "inf"]


def test_speed_benchmark(load, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("matplotlib", reason="the bench extra is not installed")
    run = benchmark(load, "run")
    monkeypatch.setattr(load("benchmarks.timing"), "MOST_ROUNDS", 2)
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))  # generates no code: seconds
    providers = ["--providers", "kdfast", "eager", "compile", "kdfast-triton", "--device", "cpu"]
    losses = [loss for loss in run.LOSSES if loss != "linear_kl"]
    assert run.main([*TOY, "--quick", *providers, "--out", str(tmp_path)]) == 0, "kdfast was inaccurate"
    printed = capsys.readouterr()
    assert "WRONG" not in printed.out
    assert "left out: kdfast-triton: its kernels run on cuda, not on cpu" in printed.err

    speed = rows_of(tmp_path / "speed.csv")
    assert list(speed[0]) == COLUMNS
    cases = {(r["loss"], r["pass"], r["shape"], r["provider"]) for r in speed}
    shown = ("kdfast", "eager", "compile", "copy")
    assert cases == set(itertools.product(losses, ("fwd", "fwd+bwd"), ("3x5", "4x1000"), shown))
    assert len(speed) == len(cases)
    for r in speed:
        assert torch.__version__ in r["machine"] and r["version"] and r["dtype"] == "float32" and r["threads"] == "1"
        assert 0 < float(r["quartile1_ms"]) <= float(r["median_ms"]) <= float(r["quartile3_ms"])
        assert float(r["gb_per_s"]) == pytest.approx(1e-6 * int(r["bytes"]) / float(r["median_ms"]))
        if r["provider"] == "copy":
            assert float(r["percent_of_copy"]) == pytest.approx(100)
        else:
            assert r["wrong"] == "False" and float(r["loss_error"]) < 1e-4 and float(r["gradient_error"]) < 1e-4
    gradients = [
        int(r["peak_bytes"]) for r in speed if (r["provider"], r["pass"], r["shape"]) == ("kdfast", "fwd+bwd", "4x1000")
    ]
    assert all(16_000 <= peak < 17_000 for peak in gradients)  # the student's gradient, and little more

    errors = {(r["provider"], r["tau"]): float(r["loss_error"]) for r in rows_of(tmp_path / "error.csv")}
    assert set(errors) == {(p, t) for p in ("kdfast", "eager", "compile") for t in ("1.0", "1000.0", "inf")} - {
        ("eager", "inf"),
        ("compile", "inf"),
    }
    assert errors["kdfast", "1000.0"] < 5e-6 < errors["eager", "1000.0"]

    for name in (*(f"{loss}-speed" for loss in losses), "kl_div_tau-error"):
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        assert "<svg" in (tmp_path / f"{name}.svg").read_text()
    table = load("benchmarks.figures").markdown(tmp_path).splitlines()
    lines = [line for line in table if line.startswith("| `")]
    assert len(lines) == 2 * len(losses)
    assert {line.count("|") for line in table if line.startswith("|")} == {lines[0].count("|")}


def test_speed_benchmark_shows_a_wrong_answer_as_wrong(load, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch):
    run = benchmark(load, "run")
    no_factor = run.PROVIDERS["eager"].losses["kl_div_tau"]
    providers = {
        **run.PROVIDERS,
        "fast": dataclasses.replace(
            run.PROVIDERS["eager"], losses={"kl_div_tau": lambda tau: lambda s, t: no_factor(tau)(s, t) / 16}
        ),
        "sick": dataclasses.replace(run.PROVIDERS["eager"], losses={"kl_div_tau": lambda tau: lambda s, t: 1 / 0}),
        "absent": dataclasses.replace(run.PROVIDERS["eager"], package="no-such-package", module="no_such_module"),
    }
    monkeypatch.setattr(run, "PROVIDERS", providers)
    arguments = ["--quick", "--device", "cpu", "--losses", "kl_div_tau", "--shapes", "4x50", "--rounds", "1", "--taus"]
    chosen = ["--providers", "kdfast", "fast", "sick", "absent", "--out", str(tmp_path)]
    assert run.main([*arguments, *chosen]) == 0  # others' errors are shown, and are not kdfast's
    printed = capsys.readouterr()
    wrong = {r["provider"]: r["wrong"] for r in rows_of(tmp_path / "speed.csv")}
    assert wrong == {"kdfast": "False", "fast": "True", "copy": ""}
    assert [line.split()[-1] for line in printed.out.splitlines() if " fast " in line] == ["WRONG", "WRONG"]
    assert "failed: sick kl_div_tau float32: ZeroDivisionError" in printed.out
    assert "left out: absent: not installed (pip install no-such-package)" in printed.err

    inexact = dataclasses.replace(
        run.PROVIDERS["kdfast"], losses={"kl_div_tau": lambda tau: lambda s, t: no_factor(tau)(s, t) * (1 + 1e-5)}
    )
    monkeypatch.setitem(providers, "kdfast", inexact)
    assert run.main([*arguments, "--providers", "kdfast", "--out", str(tmp_path)]) == 1
    assert "Inaccurate, so that its times mean nothing: kdfast kl_div_tau 4x50 float32" in capsys.readouterr().out


def test_byte_formula(load):
    """By hand: 3 rows of 5 classes; each logit read once, the student's gradient written once, an int64 label a row."""
    losses = benchmark(load, "losses")
    for loss, labels in (("kl_div_tau", 0), ("logit_mse", 0), ("logit_huber", 0), ("kd_loss", 3 * 8)):
        for dtype, size in ((torch.float32, 4), (torch.bfloat16, 2)):
            inputs = losses.LOSSES[loss].inputs(3, 5, dtype)
            assert losses.least_bytes(loss, "fwd", inputs) == 2 * 15 * size + labels
            assert losses.least_bytes(loss, "fwd+bwd", inputs) == 3 * 15 * size + labels
    student, teacher = torch.zeros(3, 5), torch.zeros(3, 5, dtype=torch.bfloat16)
    assert losses.least_bytes("kl_div_tau", "fwd+bwd", (student, teacher)) == 15 * (4 + 2 + 4)
    assert losses.least_bytes("linear_kl", "fwd", losses.LOSSES["linear_kl"].inputs(3, 5, torch.float32)) is None


@pytest.mark.parametrize("loss", ["kl_div_tau", "logit_mse", "logit_huber", "kd_loss", "linear_kl"])
def test_benchmark_truth_agrees_with_float64_pytorch(load, loss: str):
    losses = benchmark(load, "losses")
    inputs = losses.LOSSES[loss].inputs(6, 11, torch.float32)
    value, gradients = losses.LOSSES[loss].truth(inputs, 4.0)
    exact = [x.double() if x.is_floating_point() else x for x in inputs]
    wanted = [exact[i].requires_grad_() for i in losses.LOSSES[loss].wanted]
    true = losses.EAGER[loss](4.0)(*exact)
    assert value == pytest.approx(true.item(), rel=1e-12)
    for got, expected in zip(gradients, torch.autograd.grad(true, wanted), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-13)


@pytest.mark.skipif("KDFAST_GPU_EMULATOR" not in os.environ, reason="KDFAST_GPU_EMULATOR names no GPU emulator")
def test_gpu_model(load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    model = benchmark(load, "gpu_model")
    monkeypatch.chdir(ROOT)
    assert model.main(["--shapes", "4x1000", "--out", str(tmp_path)]) == 0
    assert "MODELLED, not measured" in capsys.readouterr().out
    rows = rows_of(tmp_path / "gpu_model.csv")
    assert {"kl_div_tau", "logit_mse", "logit_huber"} <= {r["loss"] for r in rows}
    for r in rows:
        least = 4 if r["call"] == "fwd" else 6  # bfloat16
        assert least <= float(r["bytes"]) <= float(r["bytes_requested"]) and float(r["instructions"]) > 1
        seconds = max(float(r["bytes"]) / 3.35e12, float(r["instructions"]) / (128 * 132 * 1.755e9))
        assert float(r["modelled_ps_H100"]) >= 0.999e12 * seconds


def test_gpu_model_needs_an_emulator(load, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    model = benchmark(load, "gpu_model")
    monkeypatch.delenv("KDFAST_GPU_EMULATOR", raising=False)
    with pytest.raises(SystemExit):
        model.main([])
    assert "KDFAST_GPU_EMULATOR" in capsys.readouterr().err
