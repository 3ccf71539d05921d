"""The demo and the benchmarks run: toy sizes, so that they cannot rot."""

from __future__ import annotations

import importlib
import math
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


def test_speed_benchmark(load, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    speed = benchmark(load, "cpu_speed")
    monkeypatch.setattr(speed, "MOST_ROUNDS", 2)
    out = tmp_path / "speed.csv"
    arguments = ["--shapes", "3x5", "2x1000", "--dtypes", "float32", "--providers", "eager", "--allocation", "reused"]
    arguments += ["--rounds", "1", "--csv", str(out)]
    assert speed.main(arguments) == 0, "kdfast was inaccurate"
    assert "eager / kdfast" in capsys.readouterr().out
    assert "2x1000" in out.read_text()
