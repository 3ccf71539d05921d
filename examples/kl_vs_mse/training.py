"""Training, with every finished network kept in a file, so that a run that was cut off goes on where it was."""

from __future__ import annotations

import functools
import json
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from examples.kl_vs_mse.losses import CE, Loss
from examples.kl_vs_mse.networks import Network
from examples.kl_vs_mse.tasks import Split, Task

#: What all students of a teacher share is made once, up to this size: the batches where they are augmented, else the logits.
KEEP_BYTES = 2**30
Batch = tuple[Tensor, Tensor, Tensor | None]  # inputs, labels, the teacher's logits


@dataclass(frozen=True)
class Recipe:
    """How a network comes to be; with a seed, it determines the network."""

    role: str
    loss: Loss = CE
    teacher: Recipe | None = None
    label_noise: float = 0.0  # the share of training labels that are drawn anew, uniformly, for it and its teachers

    def __str__(self) -> str:
        noise = f" noise={self.label_noise:g}" if self.label_noise and self.teacher is None else ""
        return f"{self.role} {self.loss}{noise}" + (f" from {self.teacher}" if self.teacher else "")


@dataclass(frozen=True)
class Trained:
    """A finished network and how it does on the test data."""

    network: Network
    accuracy: float  # percent
    cross_entropy: float
    seconds: float  # of training


class Lessons:
    """The batches of one training, the same each time they are gone through."""

    def __init__(self, task: Task, split: Split, labels: Tensor, teacher: Network | None, epochs: int, seed: int) -> None:
        self.task, self.labels, self.teacher, self.epochs, self.seed = task, labels, teacher, epochs, seed
        self.inputs = split.train
        self.per_epoch = max(1, len(labels) // task.batch)
        sample = self.inputs[0].nbytes + labels[0].numel() * (labels.element_size() + 4 * task.classes)
        fits = sample * len(labels) * (epochs if task.augment else 1) <= KEEP_BYTES
        self.kept: list[Batch] | None = [] if fits and task.augment else None
        self.logits = self._logits() if fits and not task.augment else None

    def __len__(self) -> int:
        return self.per_epoch * self.epochs

    def __iter__(self) -> Iterator[Batch]:
        if self.kept is None:
            yield from self._make()
            return
        if not self.kept:
            self.kept.extend(self._make())
        yield from self.kept

    @torch.no_grad()
    def _logits(self) -> Tensor | None:
        """The teacher's, of every training input."""
        return None if self.teacher is None else torch.cat([self.teacher(x) for x in self.inputs.split(self.task.batch)])

    @torch.no_grad()
    def _make(self) -> Iterator[Batch]:
        generator = torch.Generator().manual_seed(self.seed)  # on the CPU: the same batches on every device
        for _ in range(self.epochs):
            order = torch.randperm(len(self.labels), generator=generator)
            for start in range(0, self.per_epoch * self.task.batch, self.task.batch):
                index = order[start : start + self.task.batch].to(self.labels.device)
                inputs = self.inputs[index]
                if self.task.augment:
                    inputs = self.task.augment(inputs, generator)
                logits = None
                if self.teacher is not None:
                    logits = self.teacher(inputs) if self.logits is None else self.logits[index]
                yield inputs, self.labels[index], logits


class Laboratory:
    """Trains networks of one task, or takes them from the folder when they are there."""

    def __init__(self, task: Task, epochs: int, device: torch.device, implementation: str, folder: Path) -> None:
        self.task, self.epochs, self.device, self.implementation, self.folder = task, epochs, device, implementation, folder
        self.folder.mkdir(parents=True, exist_ok=True)
        self._check_settings()
        self.split = functools.lru_cache(maxsize=2)(self._split)
        self.lessons = functools.lru_cache(maxsize=1)(self._lessons)
        self.trained = functools.lru_cache(maxsize=None)(self._trained)

    def _check_settings(self) -> None:
        """A folder holds the results of one setting."""
        task = self.task
        settings = {
            "data": task.name, "networks": task.networks, "epochs": self.epochs, "batch": task.batch,
            "optimizer": task.optimizer, "rate": task.rate, "weight_decay": task.weight_decay, "device": self.device.type,
        }  # fmt: skip
        path = self.folder / "settings.json"
        there = json.loads(path.read_text()) if path.exists() else settings
        if not any(self.path_of_networks().glob("*.pt")):  # whoever came before has finished nothing
            path.write_text(json.dumps(settings, indent=2) + "\n")
        elif there != settings:
            differing = [f"{k}: {there.get(k)} there, {v} asked for" for k, v in settings.items() if there.get(k) != v]
            raise ValueError(
                f"{self.folder} has results of other settings ({'; '.join(differing)}): choose another --out or remove it"
            )

    def path_of_networks(self) -> Path:
        return self.folder / "networks"

    def path(self, recipe: Recipe, seed: int) -> Path:
        """The file of a finished network. The implementation of the loss matters where the loss is one of kdfast's."""
        implementation = f" {self.implementation}" if recipe.teacher is not None else ""
        return self.path_of_networks() / (f"{recipe} seed={seed}{implementation}".replace(" ", "_") + ".pt")

    def _split(self, seed: int) -> Split:
        split = self.task.split(seed)
        return Split(*(getattr(split, name).to(self.device) for name in ("train", "train_labels", "test", "test_labels")))

    def _lessons(self, teacher: Recipe | None, label_noise: float, seed: int) -> Lessons:
        split = self.split(seed)
        labels = split.train_labels
        if label_noise:
            generator = torch.Generator().manual_seed(seed)
            wrong = torch.rand(labels.shape, generator=generator) < label_noise
            drawn = torch.randint(self.task.classes, labels.shape, generator=generator)
            labels = torch.where(wrong.to(self.device), drawn.to(self.device), labels)
        network = None if teacher is None else self.trained(teacher, seed).network
        return Lessons(self.task, split, labels, network, self.epochs, seed)

    def _trained(self, recipe: Recipe, seed: int) -> Trained:
        path = self.path(recipe, seed)
        network = self.task.build(recipe.role).to(self.device)
        if path.exists():
            content: dict[str, Any] = torch.load(path, map_location=self.device, weights_only=True)
            network.load_state_dict(content.pop("state"))
            return Trained(network.eval(), **content)
        torch.manual_seed(seed)
        network = self.task.build(recipe.role).to(self.device)
        lessons = self.lessons(recipe.teacher, recipe.label_noise, seed)
        start = time.perf_counter()
        self._train(network, lessons, recipe.loss)
        seconds = time.perf_counter() - start
        split = self.split(seed)
        accuracy, cross_entropy = test(network, split.test, split.test_labels)
        content = {"accuracy": accuracy, "cross_entropy": cross_entropy, "seconds": seconds}
        path.parent.mkdir(exist_ok=True)
        unfinished = path.with_suffix(f".{os.getpid()}")
        torch.save({"state": network.state_dict(), **content}, unfinished)
        unfinished.replace(path)  # whole or not there
        return Trained(network, **content)

    def optimizer(self, network: Network) -> torch.optim.Optimizer:
        """The paper's for images, AdamW for transformers."""
        task = self.task
        options: dict[str, Any] = {"lr": task.rate, "weight_decay": task.weight_decay, "fused": True}
        if task.optimizer == "sgd":
            return torch.optim.SGD(network.parameters(), momentum=0.9, nesterov=True, **options)
        return torch.optim.AdamW(network.parameters(), **options)

    def _train(self, network: Network, lessons: Lessons, loss: Loss) -> None:
        optimizer = self.optimizer(network)
        steps = len(lessons)
        schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, [steps // 2, 3 * steps // 4])
        network.train()
        for inputs, labels, teacher_logits in lessons:
            value = loss(network(inputs), teacher_logits, labels, self.implementation)
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
            schedule.step()
        network.eval()


@torch.no_grad()
def test(network: Network, inputs: Tensor, labels: Tensor) -> tuple[float, float]:
    """Accuracy in percent, and cross-entropy."""
    right = loss = 0.0
    for x, y in zip(inputs.split(500), labels.split(500), strict=True):
        logits = network(x).flatten(0, -2)
        right += float((logits.argmax(-1) == y.flatten()).sum())
        loss += float(F.cross_entropy(logits, y.flatten(), reduction="sum"))
    return 100 * right / labels.numel(), loss / labels.numel()
