"""The study and the benchmarks run: toy sizes, so that they cannot rot."""

from __future__ import annotations

import csv
import dataclasses
import functools
import importlib
import itertools
import math
import os
import pickle
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


def program(load, name: str = "__main__") -> ModuleType:
    for needed in ("sklearn", "matplotlib", "rich"):
        pytest.importorskip(needed, reason="the demo extra is not installed")
    return load(f"examples.kl_vs_mse.{name}")


def benchmark(load, name: str) -> ModuleType:
    pytest.importorskip("rich", reason="the bench extra is not installed")
    return load(f"benchmarks.{name}")


def is_png(path: Path) -> bool:
    content = path.read_bytes()
    width, height = (int.from_bytes(content[at : at + 4], "big") for at in (16, 20))
    return content.startswith(b"\x89PNG") and width >= 500 and height >= 300


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_demo_learns_prints_and_draws(load, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    study = program(load)
    arguments = ["sweep", "limits", "--quick", "--seeds", "1", "--epochs", "15", "--out", str(tmp_path / "new folder")]
    folder = study.main(arguments).parent
    printed = capsys.readouterr().out
    names = ["teacher", "cross-entropy", *(f"kl tau={tau}" for tau in (1, 4, 20, "inf")), "mse"]
    assert all(name in printed for name in names)
    accuracies = {(row["network"], row["loss"], row["tau"]): float(row["accuracy"]) for row in rows_of(folder / "sweep.csv")}
    assert len(accuracies) == 3 + 4  # the alphas share a key
    assert accuracies["teacher", "ce", ""] > 70
    assert all(accuracy > 30 for accuracy in accuracies.values()), accuracies  # 10 is chance
    pictures = ["sweep.png", "limits-ce.png", "limits-mse.png"]
    assert all(is_png(folder / picture) for picture in pictures)
    text = (folder / "report.md").read_text()
    assert all(f"({picture})" in text for picture in pictures)

    curves = {(row["student"], row["form"], round(float(row["tau"]), 3)): row for row in rows_of(folder / "limits.csv")}
    warm, cold = curves["mse", "float64", 1e4], curves["mse", "float64", 0.05]
    assert float(warm["mse_cosine"]) > 0.9999 and float(warm["mse_ratio"]) == pytest.approx(1, abs=1e-3)
    assert float(cold["label_cosine"]) > 0.9 and float(cold["label_ratio"]) == pytest.approx(1, abs=0.2)
    assert float(curves["mse", "kdfast float32", 1e4]["error"]) < 2e-6 < float(curves["mse", "eager float32", 1e4]["error"])


@pytest.fixture
def small(load, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tasks of few samples."""
    tasks = program(load, "tasks")

    def limit(name: str, samples: int) -> None:
        whole = tasks.TASKS[name]

        def few(folder: Path):
            task = whole(folder)

            def split(seed: int):
                s = task.split(seed)
                return tasks.Split(s.train[:samples], s.train_labels[:samples], s.test[:samples], s.test_labels[:samples])

            return dataclasses.replace(task, split=split)

        monkeypatch.setitem(tasks.TASKS, name, few)

    limit("digits", 256)
    limit("text", 32)


QUICK = [
    "--quick",
    "--seeds",
    "2",
    "--epochs",
    "1",
    "--taus",
    "1",
    "inf",
    "--alphas",
    "0.5",
    "1",
    "--label-noise",
    "0.3",
    "0.6",
]


@pytest.mark.parametrize("data", ["digits", "text"])
def test_every_study(load, data: str, tmp_path: Path, small):
    folder = program(load).main(["all", "--data", data, *QUICK, "--out", str(tmp_path)]).parent
    text = (folder / "report.md").read_text()
    for name in ("sweep", "limits", "features", "sequential", "noise"):
        assert rows_of(folder / f"{name}.csv"), name
    pictures = ("sweep", "limits-ce", "limits-mse", "features", "noise")
    assert all(is_png(folder / f"{name}.png") and f"({name}.png)" in text for name in pictures)
    assert "teacher -> middle by mse, -> student by kl tau=3" in text


def test_a_study_goes_on_where_it_was(load, tmp_path: Path, small, capsys: pytest.CaptureFixture[str]):
    study = program(load)
    arguments = ["sweep", *QUICK, "--out", str(tmp_path)]
    folder = study.main(arguments).parent

    # a finished network is not trained again, and what is trained again comes out the same
    trained = {path: path.stat().st_mtime_ns for path in (folder / "networks").iterdir()}
    again = folder / "networks" / "student_mse_from_teacher_ce_seed=1_kdfast.pt"
    first = torch.load(again, weights_only=True)
    again.unlink()
    capsys.readouterr()
    study.main(arguments)
    assert "13 of 14 networks were trained before" in capsys.readouterr().out
    assert all(path.stat().st_mtime_ns == time for path, time in trained.items() if path != again)
    second = torch.load(again, weights_only=True)
    assert first["accuracy"] == second["accuracy"]
    assert all(torch.equal(value, second["state"][name]) for name, value in first["state"].items())

    # the other implementation of the losses: compared where both are there
    study.main([*arguments, "--loss-impl", "eager"])
    assert "Test accuracy by eager minus by kdfast" in (folder / "report.md").read_text()
    assert {row["loss_impl"] for row in rows_of(folder / "sweep.csv")} == {"eager", "kdfast"}

    with pytest.raises(SystemExit):
        study.main([*arguments, "--epochs", "2"])
    assert "other settings" in capsys.readouterr().err


@pytest.mark.parametrize("data", ["digits", "text"])
def test_training_is_the_same_whether_or_not_the_lessons_fit_in_memory(load, data: str, tmp_path: Path, small, monkeypatch):
    training, losses, tasks = (program(load, name) for name in ("training", "losses", "tasks"))
    student = training.Recipe("student", losses.MSE, training.Recipe("teacher"))
    states = []
    for size in (training.KEEP_BYTES, 0):
        monkeypatch.setattr(training, "KEEP_BYTES", size)
        task = tasks.TASKS[data](tmp_path)
        laboratory = training.Laboratory(task, 2, torch.device("cpu"), "kdfast", tmp_path / str(size))
        states.append(laboratory.trained(student, 0).network.state_dict())
    torch.testing.assert_close(*states)


def test_losses_of_the_study(load):
    losses = program(load, "losses")
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(3, 5, 7, generator=generator, dtype=torch.float64) for _ in range(2))
    labels = torch.randint(7, (3, 5), generator=generator)
    cross_entropy = losses.CE(student, None, labels, "kdfast")
    for loss in (losses.MSE, *(losses.kl(tau, alpha) for tau in (0.5, 3.0, math.inf) for alpha in (0.0, 0.3, 1.0))):
        fused, eager = (loss(student, teacher, labels, implementation) for implementation in losses.IMPLEMENTATIONS)
        torch.testing.assert_close(fused, eager)
    p, q = (torch.softmax(x / 3, -1) for x in (teacher, student))
    divergence = 9 * (p * (p / q).log()).sum(-1).mean()
    torch.testing.assert_close(losses.kl(3.0, 0.3)(student, teacher, labels, "kdfast"), 0.3 * divergence + 0.7 * cross_entropy)


def test_cifar100(load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    study, tasks = program(load), program(load, "tasks")
    arguments = ["sweep", "--data", "cifar100", "--data-folder", str(tmp_path), "--out", str(tmp_path / "out")]
    with pytest.raises(SystemExit):
        study.main(arguments)
    assert str(tmp_path / "cifar-100-python" / "train") in " ".join(capsys.readouterr().err.split())

    generator = torch.Generator().manual_seed(0)
    (tmp_path / "cifar-100-python").mkdir()
    for part, images in (("train", 8), ("test", 6)):
        pixels = torch.randint(256, (images, 3072), generator=generator, dtype=torch.uint8).numpy()
        content = {"data": pixels, "fine_labels": [99 - i for i in range(images)], "coarse_labels": [0] * images}
        (tmp_path / "cifar-100-python" / part).write_bytes(pickle.dumps(content))
    task = tasks.cifar100(tmp_path)
    split = task.split(0)
    assert split.train.shape == (8, 3, 32, 32) and split.test_labels.tolist() == [99, 98, 97, 96, 95, 94]
    # pixels come row by row, colour by colour, and a crop or a mirror image takes the three colours along
    assert float(split.test[0, 1, 2, 3]) == pytest.approx(
        (float(pixels[0, 1024 + 2 * 32 + 3]) / 255 - 0.4865) / 0.2564, abs=1e-5
    )
    image = torch.arange(1.0, 1 + 32 * 32).view(1, 1, 32, 32).expand(64, 3, 32, 32)
    seen = task.augment(image, generator)
    assert seen.shape == image.shape and torch.equal(seen[:, 0], seen[:, 2])
    steps = seen[:, 0, 16].diff()[:, 8:24]  # along a row, away from the border
    assert set(steps.unique().tolist()) == {1.0, -1.0}
    assert [sum(p.numel() for p in task.build(role).parameters()) for role in tasks.ROLES] == [5_872_180, 2_772_020, 703_284]

    monkeypatch.setitem(tasks.TASKS, "cifar100", lambda folder: dataclasses.replace(task, batch=4))
    folder = study.main([*arguments, "--quick", "--seeds", "1", "--epochs", "1", "--taus", "1", "--alphas", "0.5"]).parent
    assert len(rows_of(folder / "sweep.csv")) == 4


def test_study_refuses_zero_seeds(load, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit):
        program(load).main(["sweep", "--seeds", "0"])
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
