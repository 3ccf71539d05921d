"""The networks: each splits into ``features`` (up to the penultimate layer) and a linear ``head``."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Network(nn.Module):
    """What the study asks of a network."""

    def __init__(self, width: int, classes: int) -> None:
        super().__init__()
        self.head = nn.Linear(width, classes)

    def features(self, inputs: Tensor) -> Tensor:
        """(..., width): the penultimate layer."""
        raise NotImplementedError

    def forward(self, inputs: Tensor) -> Tensor:
        logits: Tensor = self.head(self.features(inputs))
        return logits


class ConvNet(Network):
    """Two convolutions for images of 8x8 pixels."""

    def __init__(self, channels: int, classes: int) -> None:
        super().__init__(2 * channels * 4 * 4, classes)
        blocks: list[nn.Module] = []
        for before, after, stride in ((1, channels, 1), (channels, 2 * channels, 2)):
            blocks += [nn.Conv2d(before, after, 3, stride, padding=1, bias=False), nn.BatchNorm2d(after), nn.ReLU()]
        self.blocks = nn.Sequential(*blocks)

    def features(self, inputs: Tensor) -> Tensor:
        flat: Tensor = self.blocks(inputs).flatten(1)
        return flat


class Transformer(Network):
    """A causal transformer over bytes."""

    def __init__(self, width: int, layers: int, context: int, classes: int) -> None:
        super().__init__(width, classes)
        self.token = nn.Embedding(classes, width)
        self.position = nn.Parameter(0.02 * torch.randn(context, width))
        layer = nn.TransformerEncoderLayer(
            width, max(1, width // 32), 4 * width, 0.0, "gelu", batch_first=True, norm_first=True
        )
        self.layers = nn.TransformerEncoder(layer, layers, norm=nn.LayerNorm(width), enable_nested_tensor=False)
        self.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(context), persistent=False)

    def features(self, inputs: Tensor) -> Tensor:
        encoded: Tensor = self.layers(self.token(inputs) + self.position, mask=self.mask, is_causal=True)
        return encoded


class WideBlock(nn.Module):
    """Two 3x3 convolutions, each after its normalisation, around a shortcut."""

    def __init__(self, before: int, after: int, stride: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.BatchNorm2d(before), nn.BatchNorm2d(after)
        self.conv1 = nn.Conv2d(before, after, 3, stride, padding=1, bias=False)
        self.conv2 = nn.Conv2d(after, after, 3, padding=1, bias=False)
        self.shortcut = nn.Conv2d(before, after, 1, stride, bias=False) if before != after else None

    def forward(self, x: Tensor) -> Tensor:
        active = F.relu(self.norm1(x))
        straight: Tensor = x if self.shortcut is None else self.shortcut(active)
        around: Tensor = self.conv2(F.relu(self.norm2(self.conv1(active))))
        return straight + around


class WideResNet(Network):
    """wrn-depth-factor for images of 32x32 pixels (Zagoruyko and Komodakis, 2016)."""

    def __init__(self, depth: int, factor: int, classes: int) -> None:
        if (depth - 4) % 6:
            raise ValueError(f"the depth of a wide residual network is 6 n + 4, got {depth}")
        super().__init__(64 * factor, classes)
        self.stem = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        blocks, before = [], 16
        for stage, stride in enumerate((1, 2, 2)):
            after = 16 * factor * 2**stage
            for position in range((depth - 4) // 6):
                blocks.append(WideBlock(before, after, stride if position == 0 else 1))
                before = after
        self.blocks = nn.Sequential(*blocks)
        self.norm = nn.BatchNorm2d(before)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out")

    def features(self, inputs: Tensor) -> Tensor:
        pooled: Tensor = F.relu(self.norm(self.blocks(self.stem(inputs)))).mean((-2, -1))
        return pooled
