"""The five studies. Each says which networks it needs, has them trained, measures, and writes its section of the report."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from examples.kl_vs_mse import measure, report
from examples.kl_vs_mse.losses import CE, IMPLEMENTATIONS, MSE, Loss, kl
from examples.kl_vs_mse.report import Section, mean_and_error
from examples.kl_vs_mse.training import Laboratory, Recipe, Trained

TEACHER = Recipe("teacher")
BY_LABELS = Recipe("student")


@dataclass(frozen=True)
class Plan:
    """What to run."""

    laboratory: Laboratory
    seeds: Sequence[int]
    taus: Sequence[float]
    alphas: Sequence[float]
    label_noise: Sequence[float]
    sequential_tau: float
    repeats: int  # of a timed call

    def train(self, name: str, recipes: Sequence[Recipe]) -> None:
        """Every recipe with every seed, those of a seed together, since they share their batches."""
        laboratory = self.laboratory
        cells = [(recipe, seed) for seed in self.seeds for recipe in recipes]
        finished = sum(laboratory.path(*cell).exists() for cell in cells)
        if finished:
            print(f"{name}: {finished} of {len(cells)} networks were trained before")
        columns = (
            TextColumn(name),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[latest]}"),
        )
        with Progress(*columns) as progress:
            task = progress.add_task(name, total=len(cells), latest="")
            for recipe, seed in cells:
                accuracy = laboratory.trained(recipe, seed).accuracy
                progress.update(task, advance=1, latest=f"seed {seed}, {recipe}: {accuracy:.1f}%")

    def results(self, recipe: Recipe, laboratory: Laboratory | None = None) -> list[Trained]:
        """One for each seed."""
        return [(laboratory or self.laboratory).trained(recipe, seed) for seed in self.seeds]

    def accuracies(self, recipe: Recipe) -> list[float]:
        """In percent, one for each seed."""
        return [trained.accuracy for trained in self.results(recipe)]

    def section(self, name: str, heading: str) -> Section:
        """An empty one."""
        return Section(name, heading, self.laboratory.folder)

    def record(self, recipes: Sequence[Recipe], laboratory: Laboratory | None = None) -> list[dict[str, object]]:
        """A line for each network."""
        laboratory = laboratory or self.laboratory
        return [
            {
                "data": laboratory.task.name, "network": recipe.role, "loss": recipe.loss.kind,
                "tau": recipe.loss.tau if recipe.loss.kind == "kl" else "", "alpha": recipe.loss.alpha,
                "teacher": recipe.teacher or "", "label_noise": recipe.label_noise, "loss_impl": laboratory.implementation,
                "seed": seed, "accuracy": trained.accuracy, "cross_entropy": trained.cross_entropy,
                "training_seconds": round(trained.seconds, 3),
            }
            for recipe in recipes
            for seed, trained in zip(self.seeds, self.results(recipe, laboratory), strict=True)
        ]  # fmt: skip


def paired(values: Sequence[float], baseline: Sequence[float]) -> str:
    """Mean and standard error of the difference, seed by seed: they share teacher, first weights and batches."""
    return mean_and_error([a - b for a, b in zip(values, baseline, strict=True)])


# ----------------------------------------------------------------------------------------------------------- sweep


def sweep(plan: Plan) -> None:
    """The alpha x tau grid, and cross-entropy and MSE alone."""
    grid = {(tau, alpha): Recipe("student", kl(tau, alpha), TEACHER) for tau in plan.taus for alpha in plan.alphas}
    by_mse = Recipe("student", MSE, TEACHER)
    recipes = [TEACHER, BY_LABELS, by_mse, *grid.values()]
    plan.train("sweep", recipes)
    section = plan.section("sweep", "alpha x tau, cross-entropy and MSE")
    labels = plan.accuracies(BY_LABELS)

    seed = plan.seeds[0]
    batch = next(iter(plan.laboratory.lessons(TEACHER, 0.0, seed)))
    student = plan.laboratory.trained(BY_LABELS, seed).network
    alone = [Recipe("student", kl(tau), TEACHER) for tau in plan.taus]
    mixed = [grid[tau, alpha] for alpha in plan.alphas if alpha == 0.5 for tau in plan.taus]
    rows = []
    for recipe in [TEACHER, BY_LABELS, *(r for r in alone if r in recipes), *mixed, by_mse]:
        results = plan.results(recipe)
        accuracies = [trained.accuracy for trained in results]
        name = {TEACHER: "teacher", BY_LABELS: "cross-entropy (labels)"}.get(recipe, str(recipe.loss))
        row = [name, mean_and_error(accuracies), f"{statistics.stdev(accuracies):.2f}" if len(accuracies) > 1 else ""]
        row += [paired(accuracies, baseline) for baseline in (labels, plan.accuracies(by_mse))]
        row.append(mean_and_error([t.cross_entropy for t in results], 3))
        if recipe.teacher is None:
            row += [""] * 4
        else:
            fused, eager, fused_step, eager_step = measure.time_loss(recipe.loss, student, batch, plan.repeats)
            row += [f"{fused:.3f}", f"{eager:.3f}", f"{fused_step:.2f}", f"{eager_step:.2f}"]
        rows.append(row)
    logits = "x".join(str(n) for n in (*batch[1].shape, plan.laboratory.task.classes))
    section.table(
        f"Test accuracy in percent over {len(plan.seeds)} seeds, mean ± standard error ({plan.laboratory.implementation}); and the "
        f"time of a step in ms, the fastest of {plan.repeats}: the loss alone ({logits} logits, forward and backward) and the step without "
        "the optimizer",
        ["learns by", "accuracy %", "std", "- labels'", "- MSE's", "test CE", "kdfast", "eager", "step, kdfast", "step, eager"],
        rows,
    )

    values = {cell: plan.accuracies(recipe) for cell, recipe in grid.items()}
    means = np.array([[statistics.mean(values[tau, alpha]) for alpha in plan.alphas] for tau in plan.taus])
    errors = np.array([[report.standard_error(values[tau, alpha]) for alpha in plan.alphas] for tau in plan.taus])
    title = (
        f"{plan.laboratory.task.name}: test accuracy, %, {len(plan.seeds)} seeds\n"
        f"cross-entropy {mean_and_error(labels)}, MSE {mean_and_error(plan.accuracies(by_mse))}"
    )
    section.plot(
        report.heat_map(plan.taus, plan.alphas, means, errors, title, "test accuracy, %"),
        "sweep",
        "accuracy over alpha and tau",
    )
    section.table(
        "Test accuracy in percent over tau (rows) and alpha (columns), mean ± standard error",
        ["tau", *(f"{alpha:g}" for alpha in plan.alphas)],
        [[f"{tau:g}", *(mean_and_error(values[tau, alpha]) for alpha in plan.alphas)] for tau in plan.taus],
    )
    records = plan.record(recipes)
    records += _against_the_other(plan, section, [r for r in recipes if r.teacher])
    section.records(records, plan.laboratory.device)
    section.save()


def _against_the_other(plan: Plan, section: Section, recipes: Sequence[Recipe]) -> list[dict[str, object]]:
    """Where the folder has the same networks by the other implementation of the losses: how they compare."""
    ours = plan.laboratory
    other_name = next(i for i in IMPLEMENTATIONS if i != ours.implementation)
    other = Laboratory(ours.task, ours.epochs, ours.device, other_name, ours.folder)
    recipes = [recipe for recipe in recipes if all(other.path(recipe, seed).exists() for seed in plan.seeds)]
    if not recipes:
        return []
    groups = {f"kl tau={tau:g}": [r for r in recipes if r.loss.kind == "kl" and r.loss.tau == tau] for tau in plan.taus}
    groups["mse"] = [r for r in recipes if r.loss == MSE]
    groups = {name: group for name, group in groups.items() if group}
    rows = []
    for name, group in groups.items():
        by_seed = [
            statistics.mean(ours.trained(r, seed).accuracy - other.trained(r, seed).accuracy for r in group)
            for seed in plan.seeds
        ]
        largest = max(
            abs(statistics.mean(plan.accuracies(r)) - statistics.mean(t.accuracy for t in plan.results(r, other)))
            for r in group
        )
        rows.append([name, str(len(group)), mean_and_error(by_seed), f"{largest:.2f}"])
    section.table(
        f"Test accuracy by {ours.implementation} minus by {other_name}, in percent, mean over the alphas ± standard error over the seeds; "
        "the largest difference of two means of a cell",
        ["loss", "cells", "difference", "largest"],
        rows,
    )
    return plan.record(recipes, other)


# ---------------------------------------------------------------------------------------------------------- limits


def limits(plan: Plan) -> None:
    """The KL gradient between label matching (tau -> 0) and logit matching (tau -> infinity)."""
    students = {"ce": BY_LABELS, "mse": Recipe("student", MSE, TEACHER)}
    plan.train("limits", [TEACHER, *students.values()])
    section = plan.section("limits", "The limits of the KL gradient")
    taus = [float(tau) for tau in np.geomspace(0.05, 1e4, 25)]
    shown = [0.05, 0.2, 1.0, 4.0, 20.0, 100.0, 1e4]
    quantities = [field.name for field in dataclasses.fields(measure.Directions)]
    records: list[dict[str, object]] = []
    for label, recipe in students.items():
        by_form: dict[str, dict[float, list[measure.Directions]]] = {
            form: {tau: [] for tau in {*taus, *shown}} for form in measure.FORMS
        }
        for seed in plan.seeds:
            inputs = plan.laboratory.split(seed).test[:256]
            with torch.no_grad():
                s, t = (plan.laboratory.trained(r, seed).network(inputs).flatten(0, -2)[:256].cpu() for r in (recipe, TEACHER))
            for form, by_tau in by_form.items():
                for tau, found in by_tau.items():
                    found.append(measure.directions(s, t, tau, form))

        mean = {
            form: {q: {tau: statistics.mean(getattr(d, q) for d in found) for tau, found in by_tau.items()} for q in quantities}
            for form, by_tau in by_form.items()
        }
        records += [
            {"data": plan.laboratory.task.name, "student": label, "form": form, "tau": tau, "seeds": len(plan.seeds)}
            | {q: mean[form][q][tau] for q in quantities}
            for form in by_form
            for tau in taus
        ]
        curves = {form: {q: [mean[form][q][tau] for tau in taus] for q in quantities} for form in by_form}
        caption = f"{plan.laboratory.task.name}: gradient of the KL loss of a student that learned by {label}"
        section.plot(report.limit_curves(taus, curves, caption), f"limits-{label}", caption)
        truth = mean["float64"]
        section.table(
            f"Student that learned by {label}: the KL gradient in float64 against its limits, and the relative error (L2) of the "
            f"gradient in other forms; means over {len(plan.seeds)} seeds",
            ["tau", "cos MSE centred", "cos MSE", "norm ratio MSE", "cos labels", "norm ratio labels", *list(by_form)[1:]],
            [
                [f"{tau:g}", f"{truth['mse_cosine'][tau]:.4f}", f"{truth['plain_mse_cosine'][tau]:.4f}", f"{truth['mse_ratio'][tau]:.4f}",
                 f"{truth['label_cosine'][tau]:.4f}", f"{truth['label_ratio'][tau]:.4f}",
                 *(f"{mean[form]['error'][tau]:.0e}" for form in list(by_form)[1:])]
                for tau in shown
            ],
        )  # fmt: skip
    section.records(records, plan.laboratory.device)
    section.save()


# -------------------------------------------------------------------------------------------------------- features


def features(plan: Plan) -> None:
    """How far students end up from their teacher, in the logits and in the penultimate layer."""
    losses = [CE, *(kl(tau) for tau in plan.taus), MSE]
    recipes = {str(loss): Recipe("student", loss, None if loss == CE else TEACHER) for loss in losses}
    plan.train("features", [TEACHER, *recipes.values()])
    section = plan.section("features", "Logits and penultimate features")
    found: dict[str, list[measure.Features]] = {}
    for name, recipe in {"teacher": TEACHER, **recipes}.items():
        found[name] = [
            measure.features(
                plan.laboratory.trained(recipe, seed).network,
                plan.laboratory.trained(TEACHER, seed).network,
                plan.laboratory.split(seed).test[:500],
            )
            for seed in plan.seeds
        ]
    columns: dict[str, Callable[[measure.Features], float]] = {
        "|s - t|": lambda f: float(f.logit_distance.mean()),
        "centred": lambda f: float(f.centred_distance.mean()),
        "penultimate norm": lambda f: float(f.norm.mean()),
        "correlation": lambda f: f.correlation,
    }
    section.table(
        f"On 500 test rows, mean ± standard error over {len(plan.seeds)} seeds: the distance of the logits from the teacher's, without the "
        "row's mean difference, the norm of the penultimate layer, and the correlation of its pairwise distances with the teacher's",
        ["learns by", *columns, "accuracy %"],
        [
            [name, *(mean_and_error([column(f) for f in by_seed], 3) for column in columns.values()),
             mean_and_error(plan.accuracies(recipes.get(name, TEACHER)))]
            for name, by_seed in found.items()
        ],
    )  # fmt: skip
    section.plot(
        report.histograms(
            {
                name: np.concatenate([f.logit_distance.cpu().numpy() for f in fs])
                for name, fs in found.items()
                if name != "teacher"
            },
            {name: np.concatenate([f.pairwise.cpu().numpy() for f in fs]) for name, fs in found.items()},
            f"{plan.laboratory.task.name}: students against their teacher, {len(plan.seeds)} seeds",
        ),
        "features",
        "distances of logits and of penultimate features",
    )
    section.records(
        [
            {"data": plan.laboratory.task.name, "learns_by": name, "seed": seed}
            | {c: column(f) for c, column in columns.items()}
            for name, by_seed in found.items()
            for seed, f in zip(plan.seeds, by_seed, strict=True)
        ],
        plan.laboratory.device,
    )
    section.save()


# ------------------------------------------------------------------------------------------------------ sequential


def sequential(plan: Plan) -> None:
    """Teacher -> middle -> student, in every order of KL and MSE."""
    losses = [kl(plan.sequential_tau), MSE]
    direct = [Recipe("student", loss, TEACHER) for loss in losses]
    middles = [Recipe("middle", loss, TEACHER) for loss in losses]
    chains = [Recipe("student", loss, middle) for middle in middles for loss in losses]
    recipes = [TEACHER, Recipe("middle"), BY_LABELS, *direct, *middles, *chains]
    plan.train("sequential", recipes)
    section = plan.section("sequential", "Sequential distillation")
    best_direct = max((plan.accuracies(r) for r in direct), key=statistics.mean)

    def row(chain: str, recipe: Recipe, middle: str = "") -> list[str]:
        accuracies = plan.accuracies(recipe)
        return [chain, middle, mean_and_error(accuracies), paired(accuracies, best_direct)]

    rows = [row("labels", BY_LABELS)]
    rows += [row(f"teacher -> student by {r.loss}", r) for r in direct]
    rows += [
        row(f"teacher -> middle by {m.loss}, -> student by {r.loss}", r, mean_and_error(plan.accuracies(m)))
        for r in chains
        if (m := r.teacher)
    ]
    rows.append(["(middle by labels)", mean_and_error(plan.accuracies(Recipe("middle"))), "", ""])
    rows.append(["(teacher)", "", mean_and_error(plan.accuracies(TEACHER)), ""])
    section.table(
        f"Test accuracy in percent, mean ± standard error over {len(plan.seeds)} seeds, and the difference from the better direct student",
        ["chain", "middle", "student", "- direct"],
        rows,
    )
    section.records(plan.record(recipes), plan.laboratory.device)
    section.save()


# ----------------------------------------------------------------------------------------------------------- noise


def noise(plan: Plan) -> None:
    """A share of the training labels drawn anew, for the teacher and for its students."""
    losses: list[Loss] = [CE, *(kl(tau) for tau in (0.1, 0.5, 1.0, 5.0, 20.0, math.inf)), MSE]

    def teacher(share: float) -> Recipe:
        return Recipe("teacher", label_noise=share)

    def student(loss: Loss, share: float) -> Recipe:
        return Recipe("student", loss, None if loss == CE else teacher(share), share)

    recipes = [r for share in plan.label_noise for r in (teacher(share), *(student(loss, share) for loss in losses))]
    plan.train("noise", recipes)
    section = plan.section("noise", "Label noise")
    curves = {"teacher": [plan.accuracies(teacher(share)) for share in plan.label_noise]}
    curves |= {str(loss): [plan.accuracies(student(loss, share)) for share in plan.label_noise] for loss in losses}
    shares = [f"{100 * share:g}%" for share in plan.label_noise]
    section.table(
        f"Accuracy in percent on clean test labels, mean ± standard error over {len(plan.seeds)} seeds, over the share of training labels "
        "drawn anew",
        ["learns by", *shares],
        [[name, *(mean_and_error(v) for v in values)] for name, values in curves.items()],
    )
    if len(shares) > 1:
        title = f"{plan.laboratory.task.name}: label noise"
        figure = report.lines(shares, curves, "share of training labels drawn anew", "test accuracy, %", title)
        section.plot(figure, "noise", "accuracy under label noise")
    section.records(plan.record(recipes), plan.laboratory.device)
    section.save()


STUDIES: dict[str, Callable[[Plan], None]] = {f.__name__: f for f in (sweep, limits, features, sequential, noise)}
