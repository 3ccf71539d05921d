"""The data, and what is trained on them: ``digits``, ``text`` and ``cifar100``."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from examples.kl_vs_mse.networks import ConvNet, Network, Transformer, WideResNet

ROLES = ("teacher", "middle", "student")
Augment = Callable[[Tensor, torch.Generator], Tensor]  # (a batch of inputs, generator) -> what the networks see


@dataclass(frozen=True)
class Split:
    """Inputs and labels to train on and to test on. A label for each row of logits: images (N,), text (N, T)."""

    train: Tensor
    train_labels: Tensor
    test: Tensor
    test_labels: Tensor


@dataclass(frozen=True)
class Task:
    """A data set, its three sizes of network and how they are trained."""

    name: str
    classes: int
    networks: dict[str, str]  # role -> what the tables call it
    build: Callable[[str], Network]  # role -> an untrained network
    split: Callable[[int], Split]  # seed -> data
    augment: Augment | None
    epochs: int
    batch: int
    optimizer: str  # "sgd" or "adamw"; the rate falls to a tenth at half and at three quarters of the epochs
    rate: float
    weight_decay: float = 5e-4
    seeds: int = 3
    alphas: Sequence[float] = tuple(i / 10 for i in range(1, 11))  # of the sweep
    label_noise: Sequence[float] = (0.2, 0.4, 0.6)


def cut(inputs: Tensor, labels: Tensor, train: int, seed: int) -> Split:
    """A random split, the seed's own."""
    order = torch.randperm(len(inputs), generator=torch.Generator().manual_seed(seed))
    learn, test = order[:train], order[train:]
    return Split(inputs[learn], labels[learn], inputs[test], labels[test])


def digits(_: Path) -> Task:
    """scikit-learn's handwritten digits, made hard: few images, under pixel noise that is fixed for the test."""
    from sklearn.datasets import load_digits

    bundled = load_digits()
    images = torch.tensor(bundled.images / 8 - 1, dtype=torch.float32)[:, None]
    labels = torch.tensor(bundled.target)
    noise, train = 0.8, 600
    channels = {"teacher": 16, "middle": 4, "student": 1}

    def split(seed: int) -> Split:
        clean = cut(images, labels, train, seed)
        blur = torch.randn(clean.test.shape, generator=torch.Generator().manual_seed(seed))
        return Split(clean.train, clean.train_labels, clean.test + noise * blur, clean.test_labels)

    return Task(
        name="digits",
        classes=10,
        networks={role: f"convolutional, {c} and {2 * c} channels" for role, c in channels.items()},
        build=lambda role: ConvNet(channels[role], 10),
        split=split,
        augment=lambda batch, generator: batch + noise * torch.randn(batch.shape, generator=generator).to(batch.device),
        epochs=50,
        batch=128,
        optimizer="sgd",
        rate=0.03,
        seeds=5,
    )


def text(_: Path) -> Task:
    """Next byte of the documentation topics that come with Python."""
    from pydoc_data.topics import topics

    context = 64
    data = torch.frombuffer(bytearray("\n".join(topics[name] for name in sorted(topics)).encode()), dtype=torch.uint8).long()
    windows = data[: (len(data) - 1) // context * context + 1]
    inputs, labels = windows[:-1].view(-1, context), windows[1:].view(-1, context)
    sizes = {"teacher": (96, 2), "middle": (64, 1), "student": (32, 1)}

    return Task(
        name="text",
        classes=256,
        networks={role: f"transformer, width {w}, layers {n}" for role, (w, n) in sizes.items()},
        build=lambda role: Transformer(*sizes[role], context, 256),
        split=lambda seed: cut(inputs, labels, len(inputs) * 9 // 10, seed),
        augment=None,
        epochs=3,
        batch=8,
        optimizer="adamw",
        rate=5e-3,
        alphas=(0.1, 0.5, 1.0),
        label_noise=(0.3, 0.6),
    )


def cifar100(folder: Path) -> Task:
    """CIFAR-100 from the folder that torchvision unpacks, with the paper's networks and training."""
    files = {part: folder / "cifar-100-python" / part for part in ("train", "test")}
    missing = [str(path) for path in files.values() if not path.is_file()]
    if missing:
        raise FileNotFoundError(
            f"CIFAR-100 is not there: missing {' and '.join(missing)}. Put the folder cifar-100-python (of cifar-100-python.tar.gz, "
            "as torchvision.datasets.CIFAR100(folder, download=True) unpacks it) into the folder that --data-folder names"
        )
    mean, deviation = (torch.tensor(v).view(3, 1, 1) for v in ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)))

    def load(part: str) -> tuple[Tensor, Tensor]:
        with files[part].open("rb") as file:
            content = pickle.load(file, encoding="latin1")
        images = torch.from_numpy(content["data"].reshape(-1, 3, 32, 32)).float() / 255
        return (images - mean) / deviation, torch.tensor(content["fine_labels"])

    whole = Split(*load("train"), *load("test"))
    sizes = {"teacher": (28, 4), "middle": (16, 4), "student": (16, 2)}

    def augment(batch: Tensor, generator: torch.Generator) -> Tensor:
        """A random crop of the image padded by 4 pixels, mirrored half of the time."""
        padded = F.pad(batch, (4, 4, 4, 4))
        down, right = torch.randint(9, (2, len(batch), 1), generator=generator).to(batch.device) + torch.arange(
            32, device=batch.device
        )
        mirrored = torch.rand(len(batch), 1, generator=generator).to(batch.device) < 0.5
        right = torch.where(mirrored, right.flip(-1), right)
        row = torch.arange(len(batch), device=batch.device)[:, None, None]
        return padded.movedim(1, -1)[row, down[:, :, None], right[:, None, :]].movedim(-1, 1)

    return Task(
        name="cifar100",
        classes=100,
        networks={role: f"wrn-{d}-{k}" for role, (d, k) in sizes.items()},
        build=lambda role: WideResNet(*sizes[role], 100),
        split=lambda _: whole,
        augment=augment,
        epochs=200,
        batch=128,
        optimizer="sgd",
        rate=0.1,
    )


TASKS: dict[str, Callable[[Path], Task]] = {"digits": digits, "text": text, "cifar100": cifar100}
