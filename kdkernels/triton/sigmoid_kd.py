"""Sigmoid KD: the rule of KL(p || q) of two outcomes, p the teacher's probabilities."""

from __future__ import annotations

import triton
import triton.language as tl

from .numerics import expm1, log1p, phi

FAMILY = "binary"


@triton.jit
def excess(d, z):
    """exp(-d) - 1 + d, of which z = exp(-d) - 1 is known; the series is good to 1/2."""
    near = tl.abs(d) < 0.5
    return tl.where(near, phi(tl.where(near, d, 0.0)), z + d)


@triton.jit
def rule(s, t, gap, first, second, third, fourth):
    """Value and d value / d s, which is q - p, of each class.

    Of the outcome that the student finds rarer, with log-odds x and y of student and teacher, KL is
    p g - log((1 + e^y) / (1 + e^x)), g = y - x; unless g is large that is p phi(log p/q) +
    (1 - p) phi(log (1-p)/(1-q)), whose terms are never negative.
    """
    likely = s > 0
    x = tl.where(likely, -s, s)
    y = tl.where(likely, -t, t)
    g = tl.where(likely, -gap, gap)
    above = y > 0
    b = tl.exp(x)
    a = tl.exp(tl.where(above, -y, y))
    of_student = 1.0 / (1.0 + b)
    of_teacher = 1.0 / (1.0 + a)
    rare = a * of_teacher
    q = b * of_student
    p = tl.where(above, of_teacher, rare)
    others = tl.where(above, rare, of_teacher)

    near = tl.abs(g) < 2.0
    grown = expm1(tl.where(near, g, 0.0))
    z = tl.where(near, q * grown, (a - b) * of_student)
    w = of_student * grown / (1.0 + grown)  # 1 - q / p, as z is (1 - q) / (1 - p) - 1
    log = log1p(z)
    d = -log1p(-w)  # log p/q
    # y may be infinite where the weight that it has is 0.
    certain = -(p * x) - tl.where(rare == 0, 0.0, rare * y)
    unsure = tl.where(p == 0, 0.0, p * g)
    far = tl.where(above, certain, unsure) - log
    difference = tl.where(near, -(p * w), q - p)
    value = tl.where(near, p * excess(d, -w) + others * excess(-log, z), far)
    return value, tl.where(likely, -difference, difference)
