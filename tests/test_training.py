"""The losses where training puts them: scaled, distributed, in threads and worker processes, exported and compiled ahead of time.

One configuration of every loss, compared with the eager chain in float64.
"""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing
from contract import LOSSES
from helpers import (
    F32,
    F64,
    Objective,
    check_grad,
    check_loss,
    default_target,
    eager,
    logits,
    peak_memory,
    relative_l2,
    to_numpy,
)
from torch import Tensor, nn

import kdfast

CASES: dict[str, dict[str, Any]] = {
    "kl": {"loss": "kl_div_tau", "tau": 4.0, "reduction": "mean"},
    "mse": {"loss": "logit_mse", "reduction": "mean"},
    "huber": {"loss": "logit_huber", "delta": 0.5, "reduction": "mean"},
    "kd": {"loss": "kd_loss", "tau": 4.0, "alpha": 0.4, "reduction": "mean"},
    "kd-mse": {"loss": "kd_loss", "soft": "mse", "alpha": 0.4, "label_smoothing": 0.1, "reduction": "mean"},
}
BACKENDS = ("cpp", "reference")
EVERYWHERE = {"losses": LOSSES, "backends": BACKENDS}

# A process whose first backward comes after Inductor is loaded starts threads of autograd's that forbid it to fork workers.
torch.zeros(1, requires_grad=True).sum().backward()


def ours(case: str, s: Tensor, t: Tensor, y: Tensor, backend: str = "cpp") -> Tensor:
    options = dict(CASES[case])
    name = options.pop("loss")
    target = {"target": y} if name == "kd_loss" else {}
    value: Tensor = getattr(kdfast, name)(s, t, backend=backend, **target, **options)
    return value


def theirs(case: str, s: Tensor, t: Tensor, y: Tensor) -> Tensor:
    return eager(student=s, teacher=t, target=y, **CASES[case])


class Student(nn.Module):
    """A layer and every loss of its logits, each by every backend asked for."""

    def __init__(self, classes: int, dtype: torch.dtype, *backends: str) -> None:
        super().__init__()
        self.layer = nn.Linear(6, classes, dtype=dtype)
        self.backends = backends
        with torch.no_grad():
            for number, parameter in enumerate(self.parameters()):
                parameter.copy_(torch.linspace(-1, 1 + number, parameter.numel(), dtype=dtype).sin().reshape(parameter.shape))

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        s = self.layer(x)
        return torch.stack([ours(case, s, t, y, backend) for backend in self.backends for case in CASES])


def batch(rows: int, classes: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Inputs of a Student, its teacher's logits, and targets."""
    random = torch.Generator().manual_seed(rows)
    return (
        torch.randn(rows, 6, generator=random, dtype=F64).to(dtype),
        logits("typical", (rows, classes), (dtype, dtype))[1],
        torch.arange(rows) * 5 % classes,
    )


def near(got: Tensor, want: Tensor, limit: float) -> None:
    assert got.shape == want.shape
    assert want.abs().max() > 0
    assert relative_l2(to_numpy(got), to_numpy(want)) <= limit


# ------------------------------------------------------------------------------------------------------------ compiled


@pytest.mark.contract("`torch.compile`, inductor: the fused operators in a training step with its optimizer", losses=LOSSES)
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_inductor_training_steps(dynamic: bool) -> None:
    """Three steps of Adam give the weights that they give uncompiled; no break in the graph; what Inductor compiles, forward and
    backward, calls kdfast's operators, and holds no softmax of its own."""
    from torch._inductor.compile_fx import compile_fx, compile_fx_inner

    graphs: list[set[str]] = []

    def inner(graph: torch.fx.GraphModule, example: Any, **options: Any) -> Any:
        graphs.append({str(node.target) for node in graph.graph.nodes if node.op == "call_function"})
        return compile_fx_inner(graph, example, **options)

    def spy(graph: torch.fx.GraphModule, example: Any) -> Any:
        return compile_fx(graph, example, inner_compile=inner)

    torch._dynamo.reset()
    weights = []
    for compiled in (True, False):
        model = Student(11, F32, "cpp")
        optimizer = torch.optim.Adam(model.parameters(), lr=0.05)

        def total(x: Tensor, t: Tensor, y: Tensor, model: nn.Module = model) -> Tensor:
            losses: Tensor = model(x, t, y)
            return losses.sum()

        run = torch.compile(total, fullgraph=True, backend=spy, dynamic=dynamic) if compiled else total
        for rows in (8, 9 if dynamic else 8, 12 if dynamic else 8):
            run(*batch(rows, 11, F32)).backward()
            optimizer.step()
            optimizer.zero_grad()
        weights.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    near(weights[0], weights[1], 1e-5)
    assert len(graphs) == 2, "one forward and one backward graph, whatever the batch"
    called = set.union(*graphs)
    assert {f"kdfast.{loss}_forward_grad.default" for loss in LOSSES} <= called, called
    assert "kdfast.scale_gradient.default" in called
    assert not any("softmax" in name or "exp" in name.split(".") for name in called), called


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_code_overwrites_no_logits(objective: Objective, backend: str) -> None:
    """inplace_backward is for eager code: a compiled graph would overwrite what others need, or a leaf that it meets later, unseen."""

    def step(x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        return objective(x, t, inplace_backward=True), x.detach()

    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, backend=backend)
    x, t = logits("typical", (6, 11))
    for make in (lambda: x.clone().requires_grad_() * 1, lambda: x.clone().requires_grad_()):
        student, plain = make(), x.clone().requires_grad_()
        squares = student.square().sum()
        loss, kept = compiled(student, t)
        (got,) = torch.autograd.grad(loss + squares, student)
        (want,) = torch.autograd.grad(objective(plain, t) + plain.square().sum(), plain)
        near(got, want, 1e-5)
        assert torch.equal(student.detach(), x) and torch.equal(kept, x)


def test_compiled_code_takes_strides_that_are_not_known(objective: Objective) -> None:
    """Of inplace_backward's conditions, which are without effect there, too."""
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda x, t: objective(x[:, :-1], t, inplace_backward=True), fullgraph=True, backend="aot_eager", dynamic=True
    )
    for length in (5, 7):
        x, t = torch.randn(3, length, 11, requires_grad=True), torch.randn(3, length - 1, 11)
        (got,) = torch.autograd.grad(compiled(x * 1, t), x)
        near(got, torch.autograd.grad(objective(x[:, :-1], t), x)[0], 1e-5)


def test_a_compiled_backward_of_an_eager_forward_overwrites_no_logits(objective: Objective) -> None:
    """Compiled autograd looks at no version counter when it runs, so that nobody would be told."""
    from torch._dynamo import compiled_autograd

    torch._dynamo.reset()
    x, t = logits("typical", (6, 11))
    student, plain = x.clone().requires_grad_(), x.clone().requires_grad_()
    inner = student * 1
    total = inner.square().sum() + objective(inner, t, inplace_backward=True)
    with compiled_autograd._enable(torch.compile(backend="aot_eager")):
        total.backward()
    (plain.square().sum() + objective(plain, t)).backward()
    assert student.grad is not None and plain.grad is not None
    near(student.grad, plain.grad, 1e-5)
    assert torch.equal(inner.detach(), x)


@pytest.mark.contract("AOTInductor", **EVERYWHERE)
def test_aot_inductor(tmp_path: Path) -> None:
    """A module with the losses, exported with a free batch, compiled, packaged, and loaded again."""
    model = Student(11, F32, *BACKENDS).eval()
    rows = torch.export.Dim("rows", min=2, max=64)
    with torch.no_grad():
        program = torch.export.export(model, batch(6, 11, F32), dynamic_shapes=({0: rows}, {0: rows}, {0: rows}))
        called = {str(node.target) for node in program.graph.nodes}
        assert {f"kdfast.{loss}_forward.default" for loss in LOSSES} <= called, called
        package = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "model.pt2"))
        loaded = torch._inductor.aoti_load_package(package)
        for count in (2, 9):
            x, t, y = batch(count, 11, F32)
            s = model.layer(x)
            wide = [theirs(case, s.double(), t.double(), y) for case in CASES] * len(BACKENDS)
            # The layer's own rounding: Inductor and eager need not multiply in the same order.
            near(loaded(x, t, y).double(), torch.stack(wide), 1e-5)


# ----------------------------------------------------------------------------------------------------- mixed precision


@pytest.mark.contract("`GradScaler`")
@pytest.mark.parametrize("backend", BACKENDS)
def test_grad_scaler(objective: Objective, backend: str) -> None:
    """float16 logits whose gradient underflows unless it is scaled; and a step whose scale overflows is left out."""
    s, t = logits("typical", (6, 35))
    truth = objective.oracle(s.half(), t, reduction="sum", denominator=1e7)
    weight = nn.Parameter(s.half().float())
    optimizer = torch.optim.SGD([weight], lr=1e6)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**20, growth_interval=1000)
    value = objective(weight.half(), t, reduction="sum", denominator=1e7, backend=backend)
    scaler.scale(value).backward()
    scaler.unscale_(optimizer)
    assert weight.grad is not None
    near(weight.grad, torch.from_numpy(truth.student), 2.0**-11 + 2e-6)
    before = weight.detach().clone()
    scaler.step(optimizer)
    scaler.update()
    assert not torch.equal(weight, before) and scaler.get_scale() == 2.0**20
    optimizer.zero_grad()
    before = weight.detach().clone()
    value = objective(weight.half(), t, reduction="sum", backend=backend)
    scaler.scale(value).backward()
    scaler.step(optimizer)
    scaler.update()
    assert torch.equal(weight, before) and scaler.get_scale() == 2.0**19


# --------------------------------------------------------------------------------------------------------- distributed


def _train(rank: int, folder: str) -> None:
    """One of two processes: a gradient step of every loss and backend, by DistributedDataParallel and by FSDP2."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import Shard, distribute_tensor

    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    try:
        shard = [part[rank::2] for part in batch(8, 11, F64)]
        found = {}
        for backend in BACKENDS:
            data_parallel = nn.parallel.DistributedDataParallel(Student(11, F64, backend))
            sharded = Student(11, F64, backend)
            fully_shard(sharded, mesh=init_device_mesh("cpu", (2,)))
            for name, model in (("ddp", data_parallel), ("fsdp", sharded)):
                for index, case in enumerate(CASES):
                    model.zero_grad()
                    model(*shard)[index].backward()
                    gradients = [p.grad.full_tensor() if name == "fsdp" else p.grad for p in model.parameters()]  # type: ignore[union-attr,operator]
                    found[name, backend, case] = [gradient.clone() for gradient in gradients]
        x, t, y = batch(8, 11, F64)
        s = Student(11, F64).layer(x).detach()
        for case in CASES:
            rows = [distribute_tensor(each, init_device_mesh("cpu", (2,)), [Shard(0)]) for each in (s, t, y)]
            ours(case, rows[0].requires_grad_(), *rows[1:], "reference").backward()
            found["dtensor", case] = rows[0].grad.full_tensor()  # type: ignore[union-attr,attr-defined]
        if rank == 0:
            torch.save(found, f"{folder}/gradients.pt")
        dist.barrier()  # neither leaves while the other is still talking to it
    finally:
        dist.destroy_process_group()
    os._exit(0)  # not through the finalization, which gloo's threads may outlive and then abort


@pytest.fixture(scope="module")
def distributed(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The gradients of rank 0, by (wrapper, backend, case)."""
    folder = tmp_path_factory.mktemp("distributed")
    torch.multiprocessing.spawn(_train, (str(folder),), nprocs=2)
    return torch.load(folder / "gradients.pt")


def _check_distributed(found: Any, wrapper: str) -> None:
    x, t, y = batch(8, 11, F64)
    for case in CASES:
        model = Student(11, F64)
        theirs(case, model.layer(x), t, y).backward()
        for backend in BACKENDS:
            for got, parameter in zip(found[wrapper, backend, case], model.parameters(), strict=True):
                assert parameter.grad is not None
                near(got, parameter.grad, 1e-12)


@pytest.mark.skipif(not dist.is_gloo_available(), reason="torch has no gloo")
@pytest.mark.contract("`DistributedDataParallel`", **EVERYWHERE)
def test_distributed_data_parallel(distributed: Any) -> None:
    """Two processes with half of the batch each: the averaged gradient is that of the whole batch's mean."""
    _check_distributed(distributed, "ddp")


@pytest.mark.skipif(not dist.is_gloo_available(), reason="torch has no gloo")
@pytest.mark.contract("FSDP2 (`fully_shard`)", **EVERYWHERE)
def test_fully_sharded_data_parallel(distributed: Any) -> None:
    _check_distributed(distributed, "fsdp")


@pytest.mark.skipif(not dist.is_gloo_available(), reason="torch has no gloo")
@pytest.mark.contract("DTensor, sharded by rows", losses=LOSSES, backends=("reference",))
def test_dtensor(distributed: Any) -> None:
    x, t, y = batch(8, 11, F64)
    for case in CASES:
        s = Student(11, F64).layer(x).detach().requires_grad_()
        theirs(case, s, t, y).backward()
        assert s.grad is not None
        near(distributed["dtensor", case], s.grad, 1e-12)


# ----------------------------------------------------------------------------------------------- threads and processes


@pytest.mark.contract("threads calling at once")
@pytest.mark.parametrize("backend", BACKENDS)
def test_threads(objective: Objective, backend: str) -> None:
    """As nn.DataParallel calls a loss: several Python threads at once, forward and backward, in both ways to a gradient."""
    work = [logits("typical", (300, 128), seed=seed) for seed in range(4)]  # more than one task of kdfast's own threads
    truths = [objective.oracle(s, t, reduction="sum") for s, t in work]
    start = threading.Barrier(len(work))
    errors: list[BaseException] = []

    def run(index: int) -> None:
        try:
            (s, t), truth = work[index], truths[index]
            start.wait(60)
            for i in range(10):
                x, y = s.clone().requires_grad_(), t.clone().requires_grad_(i % 2 == 1)
                value = objective(x, y, reduction="sum", backend=backend)
                value.backward()
                check_loss(value.detach(), truth, (s, t))
                check_grad(x.grad, truth.student, s, (s, t))
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(index,)) for index in range(len(work))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors, errors


class Distilled(torch.utils.data.Dataset[Tensor]):
    """Each item: every loss by every backend, and its student's gradient."""

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> Tensor:
        s, t = logits("typical", (300, 128), seed=index)
        y = default_target((300,), 128)
        results = []
        for backend in BACKENDS:
            for case in CASES:
                x = s.clone().requires_grad_()
                value = ours(case, x, t, y, backend)
                value.backward()
                assert x.grad is not None
                results.append(torch.cat([value.detach().reshape(1), x.grad.flatten()]))
        return torch.stack(results)


@pytest.mark.contract("`DataLoader` workers: fork, spawn", **EVERYWHERE)
@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_data_loader_workers(start: str) -> None:
    """The parent has used its threads before it forks; a worker computes the same bits, alone."""
    data = Distilled()
    here = [data[index] for index in range(len(data))]
    loader = torch.utils.data.DataLoader(data, batch_size=None, num_workers=2, multiprocessing_context=start, timeout=120)
    for got, want in zip(loader, here, strict=True):
        assert torch.equal(got, want) and want.abs().max() > 0


# -------------------------------------------------------------------------------------------------------------- memory

ROWS, CLASSES = 544, 32000
SLACK = 12 << 20  # O(rows), and what the allocator and the threads round up


@pytest.mark.contract("memory of a gradient: itself and O(rows)")
def test_memory_of_gradients(objective: Objective) -> None:
    """Written during the forward (the student's, of a scalar), or recomputed in the backward: never more than the gradients."""
    wide = torch.rand(ROWS, CLASSES), torch.rand(ROWS, CLASSES)
    narrow = tuple(x.half() for x in wide)
    for pair, grads, reduction in (
        (wide, "s", "sum"),
        (wide, "s", "none"),
        (narrow, "s", "sum"),
        (wide, "t", "sum"),
        (wide, "st", "sum"),
    ):
        s, t = (x.detach().requires_grad_(side in grads) for x, side in zip(pair, "st", strict=True))
        sides = [x for x in (s, t) if x.requires_grad]

        def step(s: Tensor = s, t: Tensor = t, sides: Any = sides, reduction: str = reduction) -> None:
            torch.autograd.grad(objective(s, t, reduction=reduction).sum(), sides)

        size = len(grads) * s.numel() * s.element_size()
        assert 0.9 * size <= peak_memory(step) < size + SLACK, (s.dtype, grads, reduction)


@pytest.mark.contract("memory of `inplace_backward`: O(rows)")
def test_memory_in_place(objective: Objective) -> None:
    s, t = torch.rand(ROWS, CLASSES), torch.rand(ROWS, CLASSES)
    inner = s.requires_grad_() * 1

    def step() -> None:
        torch.autograd.grad(objective(inner, t, inplace_backward=True), inner)

    assert peak_memory(step) < SLACK


# -------------------------------------------------------------------------------------------------------------- import


def test_import_loads_nothing_but_the_package() -> None:
    """After torch: no Triton, no other package, nothing of torch that it does not load itself (milliseconds each)."""
    code = "import sys, torch; before = set(sys.modules); import kdfast; print(*sorted(set(sys.modules) - before))"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, timeout=120)
    assert {name.partition(".")[0] for name in done.stdout.split()} == {"kdfast"}, done.stdout


def test_overhead_benchmark(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("rich", reason="the bench extra is not installed")
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1]))
    rows = importlib.import_module("benchmarks.overhead").measure(rounds=1)
    assert [row[0] for row in rows[::2]] == list(LOSSES) and len(rows) == 2 * len(LOSSES)
    assert all(float(figure) > 0 for row in rows for figure in row[2:4])
