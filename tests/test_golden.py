"""Numbers computed by hand, independent of the reference.

Logits are ``T log w`` with small whole weights w, so the probabilities are the fractions
``w / sum(w)`` and every value below can be checked on paper. R(a, b) is the exact fraction a / b.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from fractions import Fraction as R
from typing import Any

import pytest
import torch
from cases import LOSSES, Case, at_temperature, each_emulated as each, value_and_grad
from torch import Tensor

from kdkernels.registry import SPECS


@dataclass
class Golden:
    """Weights of student and teacher; loss and gradient at temperature 1 and reduction 'sum'."""

    student: list[list[int]]
    teacher: list[list[int]]
    loss: float
    gradient: list[list[R | int | float]]
    target: list[int] = field(default_factory=lambda: [0])
    options: dict[str, Any] = field(default_factory=dict)


def ln(a: int, b: int = 1) -> float:
    return math.log(R(a, b))


GOLDEN: dict[str, list[Golden]] = {
    "sigmoid_kd": [
        # Of each class w / (1 + w): q = (1/2, 3/4), p = (3/4, 1/2)
        Golden(
            [[1, 3]],
            [[3, 1]],
            0.75 * ln(3, 2) + 0.25 * ln(1, 2) + 0.5 * ln(4, 3),
            [[R(-1, 4), R(1, 4)]],
        ),
    ],
    "sigmoid_dist": [
        # q = (1/2, 3/4, 1/2), p = (3/4, 1/2, 1/2): a = (-1, 2, -1) / 12, b = (2, -1, -1) / 12, and
        # rho = -1/2. The derivative by q is -24 (b + a / 2), that of the sigmoid q (1 - q).
        Golden(
            [[1, 3, 1]],
            [[3, 1, 1]],
            1.5,
            [[R(-3, 4), 0, R(3, 4)]],
            options={"eps": 0.0, "gamma": 0.0},
        ),
    ],
    "kd": [
        # q = (1/4, 3/4), p = (1/2, 1/2):  1/2 ln 2 + 1/2 ln 2/3
        Golden([[1, 3]], [[1, 1]], ln(4, 3) / 2, [[R(-1, 4), R(1, 4)]]),
        # q = (1/8, 2/8, 5/8), p = (1/2, 1/4, 1/4):  1/2 ln 4 + 0 + 1/4 ln 2/5
        Golden(
            [[1, 2, 5]],
            [[2, 1, 1]],
            ln(4) / 2 + ln(2, 5) / 4,
            [[R(-3, 8), 0, R(3, 8)]],
        ),
        # p = (1/2, 1/2, 0): the impossible class contributes nothing, and pulls q down
        Golden([[1, 1, 2]], [[1, 1, 0]], ln(2), [[R(-1, 4), R(-1, 4), R(1, 2)]]),
        # p = q on a class both exclude; two rows
        Golden(
            [[1, 3, 0], [1, 1, 2]],
            [[1, 1, 0], [1, 1, 2]],
            ln(4, 3) / 2,
            [[R(-1, 4), R(1, 4), 0], [0, 0, 0]],
        ),
    ],
    "reverse_kl": [
        # q = (1/4, 3/4), p = (1/2, 1/2):  1/4 ln 1/2 + 3/4 ln 3/2; q_1 q_2 (ln 1/2 - ln 3/2)
        Golden(
            [[1, 3]], [[1, 1]], ln(1, 2) / 4 + 3 * ln(3, 2) / 4, [[-3 * ln(3) / 16, 3 * ln(3) / 16]]
        ),
        # a class that both exclude, and one that only the student does: 1/2 ln 2 + 1/2 ln 2
        Golden([[1, 1, 0, 0]], [[1, 1, 2, 0]], ln(2), [[0, 0, 0, 0]]),
    ],
    "mixed_kl": [
        # half of KD's first and half of reverse KL's first, added
        Golden(
            [[1, 3]],
            [[1, 1]],
            ln(4, 3) / 4 + ln(1, 2) / 8 + 3 * ln(3, 2) / 8,
            [[R(-1, 8) - 3 * ln(3) / 32, R(1, 8) + 3 * ln(3) / 32]],
        ),
    ],
    "skew_kl": [
        # q = (1/4, 3/4), p = (3/4, 1/4), alpha = 1/2, m = (1/2, 1/2):  3/4 ln 3/2 + 1/4 ln 1/2
        #   g = -1/2 (3/2, 1/2);  q_1 q_2 (g_1 - g_2) = -3/32
        Golden(
            [[1, 3]],
            [[3, 1]],
            3 * ln(3, 2) / 4 + ln(1, 2) / 4,
            [[R(-3, 32), R(3, 32)]],
            options={"alpha": 0.5},
        ),
    ],
    "skew_reverse_kl": [
        # likewise 1/4 ln 1/2 + 3/4 ln 3/2;  g = (ln 1/2 - 1/4, ln 3/2 - 3/4)
        Golden(
            [[1, 3]],
            [[3, 1]],
            3 * ln(3, 2) / 4 + ln(1, 2) / 4,
            [[-3 * ln(3) / 16 + R(3, 32), 3 * ln(3) / 16 - R(3, 32)]],
            options={"alpha": 0.5},
        ),
    ],
    "tv": [
        # q = (1/8, 2/8, 5/8), p = (1/2, 1/4, 1/4):  3/8;  g = (-1/2, 0, 1/2), sum q g = 1/4
        Golden([[1, 2, 5]], [[2, 1, 1]], R(3, 8), [[R(-3, 32), R(-1, 16), R(5, 32)]]),
    ],
    "jsd": [
        # q = (1/4, 3/4), p = (3/4, 1/4), m = (1/2, 1/2): both KL are 3/4 ln 3/2 + 1/4 ln 1/2
        #   g = (1/2 ln 1/2, 1/2 ln 3/2);  q_1 q_2 (g_1 - g_2) = -3/32 ln 3
        Golden(
            [[1, 3]],
            [[3, 1]],
            3 * ln(3, 2) / 4 + ln(1, 2) / 4,
            [[-3 * ln(3) / 32, 3 * ln(3) / 32]],
        ),
        # p = (1, 0), q = (1/2, 1/2), m = (3/4, 1/4):  1/2 ln 4/3 + 1/4 (ln 2/3 + ln 2)
        Golden(
            [[1, 1]],
            [[1, 0]],
            ln(4, 3) / 2 + (ln(2, 3) + ln(2)) / 4,
            [[-ln(3) / 8, ln(3) / 8]],
        ),
        # beta = 1/4, m = (3/8, 5/8):  3/4 ln 2 + 1/4 ln 2/5 of p, 1/4 ln 2/3 + 3/4 ln 6/5 of q
        Golden(
            [[1, 3]],
            [[3, 1]],
            (3 * ln(2) + ln(2, 5)) / 16 + 3 * (ln(2, 3) + 3 * ln(6, 5)) / 16,
            [[R(9, 64) * ln(5, 9), -R(9, 64) * ln(5, 9)]],
            options={"beta": 0.25},
        ),
        # the ends are KL and reverse KL: the numbers of those
        Golden([[1, 3]], [[1, 1]], ln(4, 3) / 2, [[R(-1, 4), R(1, 4)]], options={"beta": 0.0}),
        Golden(
            [[1, 3]],
            [[1, 1]],
            ln(1, 2) / 4 + 3 * ln(3, 2) / 4,
            [[-3 * ln(3) / 16, 3 * ln(3) / 16]],
            options={"beta": 1.0},
        ),
    ],
    "dkd": [
        # p_t = 1/2, q_t = 1/8.  TCKD = 1/2 ln 4 + 1/2 ln 4/7; q_t - p_t = -3/8, q^ = (2/7, 5/7)
        Golden(
            [[1, 2, 5]],
            [[2, 1, 1]],
            ln(16, 7) / 2,
            [[R(-3, 8), R(3, 28), R(15, 56)]],
            options={"alpha": 1.0, "beta": 0.0},
        ),
        # p^ = (1/2, 1/2):  NCKD = 1/2 ln 7/4 + 1/2 ln 7/10
        Golden(
            [[1, 2, 5]],
            [[2, 1, 1]],
            ln(49, 40) / 2,
            [[0, R(-3, 14), R(3, 14)]],
            options={"alpha": 0.0, "beta": 1.0},
        ),
        # target 2: p_t = 1/4, q_t = 5/8; p^ = (2/3, 1/3), q^ = (1/3, 2/3)
        #   TCKD = 1/4 ln 2/5 + 3/4 ln 2;  NCKD = 2/3 ln 2 - 1/3 ln 2 = 1/3 ln 2
        Golden(
            [[1, 2, 5]],
            [[2, 1, 1]],
            2 * (ln(2, 5) / 4 + ln(2) * 3 / 4) + 4 * ln(2) / 3,
            [[R(-1, 4) - R(4, 3), R(-1, 2) + R(4, 3), R(3, 4)]],
            target=[2],
            options={"alpha": 2.0, "beta": 4.0},
        ),
    ],
    "aekt": [
        # DKD's first case: the ratio p_t / q_t is (1/2) / (1/8) = 4, bounded by 3
        Golden(
            [[1, 2, 5]],
            [[2, 1, 1]],
            3 * ln(16, 7) / 2,
            [[R(-9, 8), R(9, 28), R(45, 56)]],
            options={"alpha": 1.0, "beta": 0.0, "kappa": 1.0, "ratio_max": 3.0},
        ),
        # and with kappa = 1/2 its weight is 2
        Golden(
            [[1, 2, 5]],
            [[2, 1, 1]],
            2 * ln(16, 7) / 2,
            [[R(-6, 8), R(6, 28), R(30, 56)]],
            options={"alpha": 1.0, "beta": 0.0, "kappa": 0.5, "ratio_max": 9.0},
        ),
        # DKD's third case: the ratio is (1/4) / (5/8) = 2/5, squared 4/25
        #   q_t - p_t = 3/8, q^ = (1/3, 2/3): explicit gradient 2 (4/25) (3/8) (-1/3, -2/3, 1)
        Golden(
            [[1, 2, 5]],
            [[2, 1, 1]],
            2 * R(4, 25) * (ln(2, 5) / 4 + ln(2) * 3 / 4) + 4 * ln(2) / 3,
            [[R(-1, 25) - R(4, 3), R(-2, 25) + R(4, 3), R(3, 25)]],
            target=[2],
            options={"alpha": 2.0, "beta": 4.0, "kappa": 2.0},
        ),
    ],
    "dist": [
        # row 1: q~ = (-1, 2, -1)/12, p~ = (2, -1, -1)/12, norms^2 = 1/24, q~ p~ = -1/48,
        # so rho = -1/48 / (1/24 + eps) = -1/4 with eps = 1/24;  row 2: equal, rho = 1/2
        Golden(
            [[1, 2, 1], [1, 1, 2]],
            [[2, 1, 1], [1, 1, 2]],
            (1 + 0.25) + (1 - 0.5),
            [],
            options={"beta": 1.0, "gamma": 0.0, "eps": 1 / 24},
        ),
        # columns of the same: the first two are constant in q or in p, rho = 0; the third agrees
        Golden(
            [[1, 2, 1], [1, 1, 2]],
            [[2, 1, 1], [1, 1, 2]],
            3 * (1 + 1 + 0),
            [],
            options={"beta": 0.0, "gamma": 3.0},
        ),
        # one row, rho = -1/2: d rho / dq = (3, 0, -3), so d loss / dq = (-3, 0, 3), mean under q 0
        Golden(
            [[1, 2, 1]],
            [[2, 1, 1]],
            1.5,
            [[R(-3, 4), 0, R(3, 4)]],
            options={"beta": 1.0, "gamma": 0.0},
        ),
        # q columns (1, 2, 1)/4 and (3, 2, 3)/4, p columns (2, 1, 1)/4 and (2, 3, 3)/4: rho = -1/2
        # in both; d loss / dq = (-3, 0, 3) and (3, 0, -3)
        Golden(
            [[1, 3], [2, 2], [1, 3]],
            [[2, 2], [1, 3], [1, 3]],
            3.0,
            [[R(-9, 8), R(9, 8)], [0, 0], [R(9, 8), R(-9, 8)]],
            options={"beta": 0.0, "gamma": 1.0},
        ),
    ],
}


def _logits(weights: list[list[int]], temperature: float, dtype: torch.dtype) -> Tensor:
    return temperature * torch.tensor(weights, dtype=torch.float64).log().to(dtype)


@each(
    [spec for spec in LOSSES if spec.name in GOLDEN],
    dtype={"float64": torch.float64, "float32": torch.float32},
    temperature=(1.0, 2.0),
)
def test_golden(case: Case, dtype: torch.dtype, temperature: float) -> None:
    tolerance = {"rtol": 0, "atol": 2e-6 if dtype == torch.float32 else 1e-12}
    for golden in GOLDEN[case.spec.name]:
        student = _logits(golden.student, temperature, dtype).to(case.device)
        teacher = _logits(golden.teacher, temperature, dtype).to(case.device)
        options = {**golden.options, **at_temperature(case.spec, temperature)}
        if case.spec.needs_target:
            options["target"] = torch.tensor(golden.target, device=case.device)
        if "eps" not in options and case.spec.name == "dist":
            options["eps"] = 1e-20  # not felt where norms are 1/24; keeps 0 / 0 away
        loss, gradient = value_and_grad(case, student, teacher, reduction="sum", **options)
        factor = temperature**2 if case.spec.t_squared else 1.0
        expected = torch.tensor(factor * golden.loss, dtype=dtype)
        torch.testing.assert_close(loss.cpu(), expected, **tolerance)
        if golden.gradient:
            rows = [[factor / temperature * float(g) for g in row] for row in golden.gradient]
            expected = torch.tensor(rows, dtype=dtype)
            torch.testing.assert_close(gradient.cpu(), expected, **tolerance)


@each([SPECS["kd"]], dtype={"float64": torch.float64, "float32": torch.float32})
def test_uniform_student_costs_the_logarithm_of_the_classes(case: Case, dtype) -> None:
    """A certain teacher against a uniform student: exactly ln C, at every size."""
    for classes in case.pick((2, 8, 10, 1000, 32768), (2, 8, 40)):
        teacher = torch.full((1, classes), -torch.inf, dtype=dtype, device=case.device)
        teacher[0, classes // 2] = 3.0
        loss = case(torch.zeros_like(teacher), teacher, temperature=1.0)
        assert loss.item() == pytest.approx(math.log(classes), rel=8 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("spec", LOSSES, ids=lambda spec: spec.name)
def test_every_loss_has_numbers_by_hand(spec) -> None:
    if spec.name not in GOLDEN:
        pytest.skip(f"nobody has computed numbers for {spec.name} by hand yet: add them to GOLDEN")
    assert any(golden.gradient for golden in GOLDEN[spec.name])
