"""Losses that take hidden states and an output layer: the logits of all tokens never exist."""

from .kd import linear_kd_loss as linear_kd_loss
from .logprob import LinearLogprob as LinearLogprob, linear_logprob as linear_logprob
from .module import FusedLinearKDLoss as FusedLinearKDLoss
