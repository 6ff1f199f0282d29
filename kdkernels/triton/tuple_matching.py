"""REFILLED's tuple matching: the rule of KL(p || q) over the members of a tuple, which is KD's."""

from __future__ import annotations

from .kd import rule as rule

FAMILY = "embedding"
