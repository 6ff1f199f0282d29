"""Log-probabilities of given tokens through the output layer, for objectives on sampled tokens."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import _checks, _dispatch, _head
from .._calls import traceable
from .._dtensor import none_sharded
from .._dtypes import INTEGERS
from .._group import ProcessGroup
from .._head import Head
from ..losses.kd import KD_OF_TOKENS
from ..losses.topk_kd import MOST
from ._inputs import as_linear_casts, check_ids, chunk, plain_rows
from ._logprob import LogprobCall
from ._sharded import check as check_shards
from ._sharded_logprob import apply as apply_sharded


class LinearLogprob(NamedTuple):
    """What :func:`linear_logprob` gives of each row."""

    logprob: Tensor
    """log q of the ids, of their shape; differentiable."""
    lse: Tensor
    """log-sum-exp of the softened logits; a constant."""
    entropy: Tensor
    """Entropy of q in nats; a constant."""


def linear_logprob(
    hidden: Tensor,
    weight: Tensor,
    ids: Tensor,
    *,
    bias: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    temperature: float = 1.0,
    chunk_tokens: int | None = None,
    tp_group: ProcessGroup | None = None,
    backend: str | None = None,
) -> LinearLogprob:
    r"""Log-probabilities of tokens under ``softmax(hidden @ weight.T / T)``, without the logits.

    .. math:: \log q_n(y) = \frac{z_{ny}}{T} - \log\sum_c e^{z_{nc} / T},\qquad
              z = c \tanh\bigl(\tfrac{s}{c} (h W^\top + b)\bigr)

    for rewards, policy gradients and KL estimates of sampled tokens
    (``sampled_kl_loss`` takes logits; ``0.5 * (logprob - teacher_logprob).square()`` is its k2).
    Tokens go through in chunks whose logits share one buffer. The backward pass makes the logits
    again, because the weight of each log-probability is known only then: four matrix products with
    a trained weight, three with a frozen one. The log-probability of a token that is nearly certain
    keeps its digits: it is made of what the others leave, not of 1 less that.

    Args:
        hidden: (..., H) hidden states after the final norm, at least two dimensions; float64,
            float32, float16 or bfloat16.
        weight: (V, H), of the same dtype and device.
        ids: class indices in [0, V) of the shape of the rows, or with a last dimension K of 1 to
            1024 beside it: K tokens a row, of which some may be the same. Any integer type. On a
            GPU an id out of range gives NaN.
        bias: (V,), or None.
        softcap: bound of the logits, > 0, or None.
        logit_scale: multiplies the logits before the softcap.
        temperature: T > 0, after the softcap.
        chunk_tokens: tokens of a chunk; None: from 64 MiB of logits on a CPU, 1 GiB on a GPU.
        tp_group: the classes are those of all ranks of this torch.distributed group, in their
            order: ``weight`` (V_r, H) and ``bias`` are the rank's rows, whose number may differ or
            be 0, hidden states and ids are every rank's, and ids are global. The results are the
            same on every rank, and so is the gradient of ``hidden``, which is summed over the ranks
            as Megatron's ColumnParallelLinear sums it; those of weight and bias are the rank's own.
            8 (K + 3 W) bytes of each row are summed over W ranks, and K + 1 numbers of it kept for
            the backward pass, which exchanges the gradient of ``hidden`` alone.
        backend: of the rows' kernel; ``'reference'`` materialises the logits, but those of one
            chunk with ``tp_group``.

    Returns:
        :class:`LinearLogprob`, float32 (float64 for float64 inputs).

    Raises:
        ValueError, TypeError: ``name must be <expected>, got <got>``.
    """
    names = ("hidden", "weight", "bias")
    hidden, weight, bias = as_linear_casts(hidden, weight, bias)
    plain_rows(names, (hidden, weight, bias))
    none_sharded(names[0], {"ids": ids})
    sharded = check_shards(tp_group, hidden, weight, bias)
    least = 0 if sharded else 2
    softcap, logit_scale = _head.check(hidden, weight, bias, softcap, logit_scale, names, least)
    temperature = _checks.temperature(temperature)
    tokens = chunk(chunk_tokens)
    rows = hidden.shape[:-1]
    _check_ids(ids, hidden, None if sharded else weight.shape[0])
    flat = hidden.reshape(-1, hidden.shape[-1])
    several = ids.reshape(flat.shape[0], ids.shape[-1] if ids.dim() > len(rows) else 1)
    chosen = _dispatch.choose_beside_cuda(KD_OF_TOKENS, hidden, backend)
    if sharded:
        call = LogprobCall(chosen, [temperature], None, softcap or 0.0, logit_scale, tokens)
        found = apply_sharded(tp_group, call, flat, weight, bias, several)
    elif chosen == "reference":
        found = _reference(Head(weight, bias, softcap, logit_scale), flat, several, temperature)
    else:
        call = LogprobCall(chosen, [temperature], None, softcap or 0.0, logit_scale, tokens)
        operator = torch.ops.kdkernels.linear_logprob.default
        found = operator(flat, weight, bias, several, *traceable(call))
    logprob, lse, entropy = found
    return LinearLogprob(logprob.reshape(ids.shape), lse.reshape(rows), entropy.reshape(rows))


def _check_ids(ids: Any, hidden: Tensor, classes: int | None) -> None:
    _checks.tensor("ids", ids)
    rows = hidden.shape[:-1]
    if ids.shape != rows and (ids.shape[:-1] != rows or not 1 <= ids.shape[-1] <= MOST):
        expected = f"of shape {tuple(rows)} or {(*rows, 'K')}, K from 1 to {MOST}"
        raise _checks.fail("ids", expected.replace("'K'", "K"), tuple(ids.shape))
    if ids.dtype not in INTEGERS:
        raise _checks.fail_type("ids", "of an integer dtype", ids.dtype)
    if ids.device != hidden.device:
        raise _checks.fail("ids", f"on the device of hidden, {hidden.device}", ids.device)
    _checks.allocated("ids", ids)
    if classes is not None:
        check_ids(ids, classes)


def _reference(
    head: Head, hidden: Tensor, ids: Tensor, temperature: float
) -> tuple[Tensor, Tensor, Tensor]:
    logits = head.logits(hidden)
    logits = (logits if logits.dtype == torch.float64 else logits.float()) / temperature
    log_q = logits.log_softmax(-1)
    entropy = torch.special.entr(log_q.detach().exp()).sum(-1)
    return log_q.gather(-1, ids.long()), logits.detach().logsumexp(-1), entropy
