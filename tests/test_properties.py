"""Random calls over the whole argument space (problems.py), drawn by hypothesis, which looks for a smaller one that fails."""

from __future__ import annotations

import random
from typing import Any

import pytest
from helpers import Where
from hypothesis import HealthCheck, assume, given, note, settings
from hypothesis import strategies as st
from problems import LOSSES, Problem, build, draw, judge, spoilt

settings.register_profile("kdfast", deadline=None, derandomize=True, suppress_health_check=list(HealthCheck), print_blob=True)
settings.load_profile("kdfast")

CHOICES = st.randoms(use_true_random=False)
LOSS = pytest.mark.parametrize("loss", LOSSES)


def run(p: Problem, arguments: dict[str, Any], device: str = "cpu") -> str:
    note(f"{p}")
    return judge(p.loss, arguments, grad_output=p.grad_output, seed=p.seed, mode=p.mode, device=device)


@LOSS
@settings(max_examples=200)
@given(choices=CHOICES)
def test_kernels(kernel: Where, loss: str, choices: random.Random) -> None:
    assume(kernel.has(loss))
    p = draw(choices, (loss,))
    assert run(p, build(p) | {"backend": kernel.backend}, kernel.device) == "right"


@LOSS
@settings(max_examples=60)
@given(choices=CHOICES)
def test_reference(loss: str, choices: random.Random) -> None:
    p = draw(choices, (loss,))
    arguments = build(p) | {"backend": "reference"}
    assume(not arguments.get("inplace_backward"))
    assert run(p, arguments) == "right"


@settings(max_examples=200)
@given(choices=CHOICES)
def test_right_or_refused(choices: random.Random) -> None:
    p = draw(choices)
    run(p, spoilt(choices, p, build(p)))
