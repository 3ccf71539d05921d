"""Fixtures: ``where`` runs a test on every (device, backend) pair there is, ``kernel`` on those with kernels of our
own."""

from __future__ import annotations

import os
import sys

import pytest
import torch

sys.path.insert(0, os.path.dirname(__file__))

import contract
import helpers


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--contract", action="store_true", help="write docs/contract.md from what the tests prove")


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(contract.Collector(config))
    torch.set_num_threads(min(2, torch.get_num_threads()))


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    for name in ("where", "kernel"):
        if name in metafunc.fixturenames:
            pairs = [w for w in helpers.places() if name == "where" or w.backend != "reference"]
            metafunc.parametrize(name, pairs, ids=str)


@pytest.fixture(params=contract.LOSSES)
def loss(request: pytest.FixtureRequest) -> str:
    return request.param


OBJECTIVES = [helpers.Objective(name) for name in contract.LOSSES] + [helpers.Objective("kd_loss", (("soft", "mse"),))]


@pytest.fixture(params=OBJECTIVES, ids=str)
def objective(request: pytest.FixtureRequest) -> helpers.Objective:
    return request.param
