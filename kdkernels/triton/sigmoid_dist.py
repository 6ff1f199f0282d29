"""DIST over sigmoids: the rule of DIST, whose traversal takes the sigmoid of each logit."""

from __future__ import annotations

from . import dist

FAMILY = "correlation"
SIGMOID = True
rule = dist.rule
