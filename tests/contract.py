"""docs/contract.md: what holds for which loss on which backend, collected from the tests that prove it.

A test says what it proves by a mark, ``@pytest.mark.contract("row")``, with the title of a row below. Its parameters say for which
loss (``loss``, ``name``, ``variant`` or ``objective``) and backend (``where``, ``kernel`` or ``backend``; without one: "cpp");
``losses=`` and ``backends=`` of the mark say it where there is no parameter. A cell is ticked where a test of it passed.

``pytest --contract`` rewrites the table, and a whole run fails where the table says something else than the run proved. A run of a
part of the tests (``-k``, a file) proves too little for that: it never fails here, and ``--contract`` with ``-k`` only adds ticks.
The columns of a backend that is not there (a GPU's) are kept as they are.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest

LOSSES = ("kl_div_tau", "logit_mse", "logit_huber", "kd_loss")
BACKENDS = {"cpp": "C++", "reference": "reference", "cuda": "CUDA C++", "triton": "Triton"}
PLACES = {"cpu-cpp": "cpp", "cpu-reference": "reference", "cuda-cpp": "cuda", "cuda-triton": "triton"}
ROWS = (
    "first derivatives: student, teacher, both (gradcheck)",
    "second derivatives: `create_graph`, gradgradcheck",
    "a gradient-penalty training step",
    "forward-mode AD: dual numbers, forward over reverse",
    "`torch.func`: grad, vjp, jvp, jacrev, jacfwd, hessian, linearize",
    "`torch.autograd.functional`",
    "`torch.vmap`: any in_dims and out_dims",
    "per-sample gradients: vmap over grad",
    "a second backward through a retained graph",
    "`torch.compile(fullgraph=True)`, aot_eager: static and dynamic shapes",
    "`torch.compile`, inductor: the fused operators in a training step with its optimizer",
    "no recompilation when only the batch changes",
    "`torch.export`, the batch left free",
    "`torch.export` of a training step",
    "AOTInductor",
    "`torch.utils.checkpoint`",
    "autocast: bfloat16, float16",
    "`GradScaler`",
    "`DistributedDataParallel`",
    "FSDP2 (`fully_shard`)",
    "DTensor, sharded by rows",
    "threads calling at once",
    "`DataLoader` workers: fork, spawn",
    "deepcopy and pickle of the module",
    "`torch.use_deterministic_algorithms`",
    "same input, same bits, any number of threads",
    "memory of a gradient: itself and O(rows)",
    "memory of `inplace_backward`: O(rows)",
    "strided logits are not copied",
    "no reference cycles",
    "no growth over 10,000 steps",
    "inputs are never written",
    "rows of weight 0 may hold anything",
    "-inf on both sides is as if the class were not there",
    "NaN stays in its row",
    "wrong arguments: an error that names the argument",
)
DOCUMENT = Path(__file__).parents[1] / "docs" / "contract.md"
TEXT = """# The contract

What holds for each loss on each backend, besides the values themselves: each tick is a test that passed, and the tests named in its
row prove it. `make test` fails where this table says something else than the tests prove; `python -m pytest --contract` writes it.
Values and derivatives are compared with eager PyTorch in float64 or with a float64 oracle. The columns: C++ on the CPU, "reference"
(plain torch, which also serves `torch.func`, forward-mode AD and `create_graph` for every backend; its blanks are promises about
kernels: it has no operator of its own, keeps (rows, K) tensors and takes no `inplace_backward`), and those of a GPU once its tests
have run on one.

"""


class Cell(NamedTuple):
    row: str
    loss: str
    backend: str


def cells_of(item: pytest.Item) -> set[Cell]:
    """What a test proves if it passes."""
    parameters: dict[str, Any] = item.callspec.params if hasattr(item, "callspec") else {}
    found = set()
    for mark in item.iter_markers("contract"):
        (row,) = mark.args
        losses = mark.kwargs.get("losses") or _loss_of(item, parameters)
        place = parameters.get("where", parameters.get("kernel"))
        backend = parameters.get("backend", "cpp") if place is None else PLACES.get(str(place))
        backends = mark.kwargs.get("backends") or ((backend,) if backend else ())
        if row not in ROWS or not set(losses) <= set(LOSSES) or not set(backends) <= set(BACKENDS):
            raise pytest.UsageError(
                f"{item.nodeid}: the mark contract has an unknown row, loss or backend: {row!r}, {losses}, {backends}"
            )
        found |= {Cell(row, loss, backend) for loss in losses for backend in backends}
    return found


def _loss_of(item: pytest.Item, parameters: dict[str, Any]) -> Sequence[str]:
    if "objective" in parameters:
        return (parameters["objective"].loss,)
    if "variant" in parameters:
        return (item.module.VARIANTS[parameters["variant"]]["loss"],)  # type: ignore[attr-defined]
    return tuple(parameters[name] for name in ("loss", "name") if name in parameters)[:1]


def render(cells: Iterable[Cell], tests: dict[str, list[str]]) -> str:
    cells = set(cells)
    columns = [(loss, backend) for loss in LOSSES for backend in BACKENDS if any(cell.backend == backend for cell in cells)]
    lines = [
        ["", *(f"`{loss}` {BACKENDS[backend]}" for loss, backend in columns), "proved by"],
        ["---", *[":-:"] * len(columns), "---"],
    ]
    for row in ROWS:
        ticks = ["✓" if Cell(row, *column) in cells else "" for column in columns]
        lines.append([row, *ticks, ", ".join(_link(test) for test in tests.get(row, []))])
    return TEXT + "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _link(test: str) -> str:
    file, name = test.split("::")
    return f"[{name}](../tests/{file})"


def parse(text: str) -> set[Cell]:
    """The ticks of a written table."""
    table = [[field.strip() for field in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("|")]
    if not table:
        return set()
    columns = {f"`{loss}` {title}": (loss, backend) for loss in LOSSES for backend, title in BACKENDS.items()}
    return {
        Cell(line[0], *columns[head])
        for line in table[2:]
        for head, field in zip(table[0], line, strict=True)
        if field == "✓" and line[0] in ROWS and head in columns
    }


def differences(written: set[Cell], proved: set[Cell]) -> list[str]:
    """How a written table differs from a whole run, among the backends that both know."""
    common = {cell.backend for cell in written} & {cell.backend for cell in proved} or set(BACKENDS)
    unlike = sorted(cell for cell in written ^ proved if cell.backend in common)
    return [
        f"{'ticked, but not proved' if cell in written else 'proved, but not ticked'}: {', '.join(cell)}" for cell in unlike
    ]


class Collector:
    """A plugin of pytest: what the run proves, and at its end the table."""

    def __init__(self, config: pytest.Config) -> None:
        self.rewrite = config.getoption("contract")
        ignored = config.getoption("ignore") or config.getoption("ignore_glob")
        self.whole = config.args_source is pytest.Config.ArgsSource.TESTPATHS and not ignored
        if self.rewrite and not self.whole:
            raise pytest.UsageError("--contract collects every test; choose the ones to run with -k")
        self.provable: dict[str, set[Cell]] = {}
        self.tests: dict[str, list[str]] = {}
        self.proved: set[Cell] = set()
        self.report: list[str] = []

    def pytest_itemcollected(self, item: pytest.Item) -> None:
        cells = cells_of(item)
        self.provable[item.nodeid] = cells
        name = f"{item.path.name}::{item.originalname}"  # type: ignore[attr-defined]
        for row in {cell.row for cell in cells}:
            if name not in self.tests.setdefault(row, []):
                self.tests[row].append(name)

    def pytest_deselected(self, items: Sequence[pytest.Item]) -> None:
        self.whole = self.whole and not items

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" and report.passed and not hasattr(report, "wasxfail"):
            self.proved |= self.provable[report.nodeid]

    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(self, session: pytest.Session, exitstatus: int) -> None:
        if exitstatus != pytest.ExitCode.OK or session.config.option.collectonly:
            return
        text = DOCUMENT.read_text() if DOCUMENT.exists() else ""
        written = parse(text)
        if self.rewrite:
            here = {cell.backend for cell in self.proved}
            kept = {cell for cell in written if not self.whole or cell.backend not in here}
            DOCUMENT.parent.mkdir(exist_ok=True)
            DOCUMENT.write_text(render(self.proved | kept, self.tests))
        elif self.whole:
            self.report = differences(written, self.proved)
            if not self.report and text != render(written, self.tests):
                self.report = ["its words or the tests it names are not the current ones"]
            if self.report:
                session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        if self.report:
            terminalreporter.section("docs/contract.md differs from what these tests prove", red=True)
            terminalreporter.write("\n".join([*self.report, "`python -m pytest --contract` writes it.", ""]))
