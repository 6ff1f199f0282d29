"""Clustered rows on the emulated device where a cluster walks several rows.

The next row's copies come to the places that this row's last sweep leaves; a device with few
multiprocessors has fewer clusters than rows.
"""

from __future__ import annotations

import cuda_emulator
import pytest
import torch
from cases import same_bits
from inputs import make
from test_cuda_kernels import OPTIONS, ROW_RULES, against_reference, close
from torch import Tensor

from kdkernels.registry import SPECS

pytestmark = pytest.mark.skipif(
    cuda_emulator.compiler() is None, reason="the emulator needs a C++ compiler"
)
ONE = {**cuda_emulator.SMALL, "multiprocessors": 1}
SIZES = ((40, 40), (11, 4104), (13, 20008))


def clustered(rule: str, inputs: tuple[Tensor, ...], seed: int = 1) -> tuple[Tensor, Tensor]:
    scale = 16.0 if SPECS[rule].t_squared else 1.0
    options = {"scale": scale, "traversal": "cluster", "device": ONE, "seed": seed}
    loss, gradient, _ = cuda_emulator.row_loss(rule, *inputs, OPTIONS[rule], **options)
    assert gradient is not None
    return loss, gradient


@pytest.mark.parametrize("rule", ROW_RULES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_the_next_row_comes_in_the_place_of_this_one(
    rule: str, dtype: torch.dtype, size: tuple[int, int]
) -> None:
    student, teacher, target = make("gaussian", *size, dtype=dtype)
    ignored = [1, 5, 6, size[0] - 1]  # of which nothing is copied
    target[ignored] = -100
    student[ignored] = float("nan")
    loss, gradient = clustered(rule, (student, teacher, target))
    expected_loss, expected = against_reference(rule, student, teacher, target)
    torch.testing.assert_close(loss.double(), expected_loss, rtol=2e-6, atol=0)
    close(gradient, expected)
    assert not gradient[ignored].any()


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_rows_of_a_cluster_do_not_depend_on_the_schedule(size: tuple[int, int]) -> None:
    inputs = make("gaussian", *size)
    first = clustered("dkd", inputs)
    for seed in range(2, 6):
        other = clustered("dkd", inputs, seed=seed)
        assert all(same_bits(a, b) for a, b in zip(first, other, strict=True))
