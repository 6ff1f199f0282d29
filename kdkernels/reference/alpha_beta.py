"""The alpha-beta divergence (ABKD: Wang et al., 2025; Cichocki et al., 2011): the specification.

    p = softmax(teacher / T),  q = softmax(student / T),  s = alpha + beta       per row
    loss_row = sum_i 1 / (alpha beta) (alpha / s p_i^s + beta / s q_i^s - p_i^alpha q_i^beta)
    d loss_row / d student_i = (g_i - q_i sum_j g_j) / T,
    g_i = 1 / alpha (q_i^s - p_i^alpha q_i^beta)

and its limits: alpha = 1, beta = 0 is KL(p || q), alpha = 0, beta = 1 is KL(q || p). With X the
larger of p_i^s and q_i^s, x = |log p_i - log q_i|, a the exponent of the smaller probability and b
the other's, a class's part is X f(x),

    f(x) = x / s [(1 - (1 + y) exp(-y)) / y + exp(-y) phi(z) / z],  y = a x,  z = b x,
    phi(z) = exp(-z) - 1 + z,

whose terms are positive, and where nothing is divided by alpha or beta.

Edges: infinite where beta = 0 and only the student excludes a class, or alpha = 0 and only the
teacher does; else finite. A row that is all -inf, or holds NaN or +inf, gives NaN and touches no
other row.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .._tracing import operand
from ._rows import rescale
from ._tokens import log_softmax, with_nan_of


def alpha_beta(
    student: Tensor,
    teacher: Tensor,
    *,
    alpha: float = 0.2,
    beta: float = 0.7,
    temperature: float = 1.0,
    standardize: bool = False,
) -> Tensor:
    """Divergence of each row: (rows, classes) x (rows, classes) -> (rows,)."""
    student, teacher = rescale(student, teacher, temperature, standardize)
    log_p, log_q = log_softmax(teacher), log_softmax(student)
    # A power that underflows is 0, whatever it would be multiplied with.
    neither = (torch.maximum(log_p, log_q).detach() * operand(alpha + beta)).exp() == 0
    neither = neither | ((log_p == -torch.inf) & (log_q == -torch.inf))
    d = torch.where(neither, 0.0, log_p - log_q)
    of_student = d < 0
    x = torch.where(of_student, -d, d)
    larger = torch.where(of_student, log_q, log_p)
    # Each of its own classes: an infinite x of the others would make NaN of the gradient.
    by_student = _parts(torch.where(of_student, x, 0.0), alpha, beta)
    by_teacher = _parts(torch.where(of_student, 0.0, x), beta, alpha)
    f = torch.where(of_student, by_student, by_teacher)
    scale = torch.where(neither, 0.0, larger * operand(alpha + beta)).exp()
    values = torch.where(neither, 0.0, scale * f)
    return with_nan_of(log_p, values.sum(-1))


def _parts(x: Tensor, a: float, b: float) -> Tensor:
    """f of the classes of which a is the exponent of the smaller probability."""
    first = x.new_zeros(()) if a == 0 else _bounded(x * a) / a
    decay = torch.exp(-x * a) if a else torch.ones_like(x)
    endless = x == torch.inf  # where a is 0: f is x / s there, whose derivative is finite
    near = torch.where(endless | (decay == 0), 0.0, x)
    second = x.new_zeros(()) if b == 0 else near * _ratio(near * b) * decay
    if a == 0:
        second = second + torch.where(endless, x, 0.0)
    return (first + second) / (a + b)


def _bounded(y: Tensor) -> Tensor:
    """1 - (1 + y) exp(-y) for y >= 0: the sum of (-y)^k (1 - k) / k! where y is small."""
    near = y < 1
    u = torch.where(near, y, 0.0)
    series = torch.zeros_like(u)
    for k in range(20, 1, -1):
        series = series * u + (-1) ** k * (k - 1) / math.factorial(k)
    far = torch.where(near | (y == torch.inf), 1.0, y)
    closed = torch.where(y == torch.inf, 1.0, 1 - (1 + far) * torch.exp(-far))
    return torch.where(near, series * u * u, closed)


def _ratio(z: Tensor) -> Tensor:
    """phi(z) / z = (exp(-z) - 1) / z + 1 for z >= 0, by its series where z is small."""
    near = z < 1
    u = torch.where(near, z, 0.0)
    series = torch.zeros_like(u)
    for k in range(20, 1, -1):
        series = series * u + (-1) ** k / math.factorial(k)
    far = torch.where(near, 1.0, z)
    return torch.where(near, series * u, torch.expm1(-far) / far + 1)
