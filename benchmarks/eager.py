"""The losses as people write them without this library: a few lines of eager PyTorch.

They follow the form of the code published with the papers, because that is what is copied into
projects: DKD builds one-hot masks and shifts the target logit by -1000, AEKT does so too, DIST
computes the cosine of centred rows and transposes for the columns. For (N, C, H, W) KD, DKD and
AEKT work on dim 1 in place, which is their fastest form, and DIST flattens the pixels to rows, as
its authors do.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from kdkernels.registry import LossSpec

from . import embedding_eager


def kd(student: Tensor, teacher: Tensor, temperature: float = 4.0) -> Tensor:
    log_q = F.log_softmax(student / temperature, dim=1)
    p = F.softmax(teacher / temperature, dim=1)
    if student.dim() == 2:
        return F.kl_div(log_q, p, reduction="batchmean") * temperature * temperature
    pixels = student.numel() // student.shape[1]
    return F.kl_div(log_q, p, reduction="sum") / pixels * temperature * temperature


def _classes(logits: Tensor) -> int:
    """The dimension that holds the classes."""
    return 1 if logits.dim() == 4 else -1


def _mean_over_rows(terms: Tensor) -> Tensor:
    return terms.sum() / (terms.numel() // terms.shape[_classes(terms)])


def _softmaxes(student: Tensor, teacher: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    classes = _classes(student)
    return (
        F.softmax(student / temperature, dim=classes),
        F.softmax(teacher / temperature, dim=classes),
    )


def _log_softmaxes(student: Tensor, teacher: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    classes = _classes(student)
    return (
        F.log_softmax(student / temperature, dim=classes),
        F.log_softmax(teacher / temperature, dim=classes),
    )


def reverse_kl(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    log_q, log_p = _log_softmaxes(student, teacher, temperature)
    return _mean_over_rows(F.kl_div(log_p, log_q, reduction="none", log_target=True))


def jsd(student: Tensor, teacher: Tensor, beta: float = 0.5, temperature: float = 1.0) -> Tensor:
    """As in TRL: the mixture by logsumexp of the log-probabilities."""
    log_q, log_p = _log_softmaxes(student, teacher, temperature)
    shares = (log_q + math.log1p(-beta), log_p + math.log(beta))
    log_m = torch.logsumexp(torch.stack(shares), dim=0)
    of_teacher = F.kl_div(log_m, log_p, reduction="none", log_target=True)
    of_student = F.kl_div(log_m, log_q, reduction="none", log_target=True)
    return _mean_over_rows(beta * of_teacher + (1 - beta) * of_student)


def mixed_kl(
    student: Tensor, teacher: Tensor, forward_weight: float = 0.5, temperature: float = 1.0
) -> Tensor:
    log_q, log_p = _log_softmaxes(student, teacher, temperature)
    forward = F.kl_div(log_q, log_p, reduction="none", log_target=True)
    reverse = F.kl_div(log_p, log_q, reduction="none", log_target=True)
    return _mean_over_rows(forward_weight * forward + (1 - forward_weight) * reverse)


def skew_kl(
    student: Tensor, teacher: Tensor, alpha: float = 0.1, temperature: float = 1.0
) -> Tensor:
    """As in DistiLLM: the mixture of the probabilities."""
    classes = _classes(student)
    q = F.softmax(student / temperature, dim=classes)
    log_p = F.log_softmax(teacher / temperature, dim=classes)
    mixture = alpha * log_p.exp() + (1 - alpha) * q
    return _mean_over_rows(log_p.exp() * (log_p - mixture.log()))


def skew_reverse_kl(
    student: Tensor, teacher: Tensor, alpha: float = 0.1, temperature: float = 1.0
) -> Tensor:
    classes = _classes(student)
    log_q = F.log_softmax(student / temperature, dim=classes)
    p = F.softmax(teacher / temperature, dim=classes)
    mixture = (1 - alpha) * p + alpha * log_q.exp()
    return _mean_over_rows(log_q.exp() * (log_q - mixture.log()))


def alpha_beta(
    student: Tensor,
    teacher: Tensor,
    alpha: float = 0.2,
    beta: float = 0.7,
    temperature: float = 1.0,
) -> Tensor:
    """As in ABKD: powers of the probabilities."""
    q, p = _softmaxes(student, teacher, temperature)
    total = alpha + beta
    terms = alpha / total * p**total + beta / total * q**total - p**alpha * q**beta
    return _mean_over_rows(terms / (alpha * beta))


def acceptance(
    student: Tensor,
    teacher: Tensor,
    kind: str = "log",
    eta: float = 3.0,
    temperature: float = 1.0,
) -> Tensor:
    """As in speculators: one mean over the vocabulary's smaller probabilities, bounded at 1e-5."""
    q, p = _softmaxes(student, teacher, temperature)
    classes = _classes(student)
    accepted = torch.minimum(p, q).sum(classes)
    if kind == "log":
        return -accepted.clamp_min(1e-5).log().mean()
    weight = torch.exp(-eta * accepted.detach())
    divergence = (p * (p.log() - q.log())).sum(classes)
    return (weight * divergence + (1 - weight) * (1 - accepted)).mean()


def sampled_kl(
    student: Tensor, sampled_ids: Tensor, teacher_logprob: Tensor, estimator: str = "k2"
) -> Tensor:
    """As in verl: the whole log-softmax, of which one class a row is taken."""
    classes = _classes(student)
    log_q = F.log_softmax(student, dim=classes)
    d = teacher_logprob - log_q.gather(classes, sampled_ids.unsqueeze(classes)).squeeze(classes)
    estimates = {"k1": -d, "k2": d.square() / 2, "k3": d.exp() - 1 - d}
    return estimates[estimator].mean()


def topk_kd(student: Tensor, teacher_ids: Tensor, teacher_logprobs: Tensor) -> Tensor:
    """As in DistillKit: the whole log-softmax, the ids' part of it, and one bucket for the rest."""
    classes = _classes(student)
    log_q = F.log_softmax(student, dim=classes).movedim(classes, -1).gather(-1, teacher_ids)
    p, q = teacher_logprobs.exp(), log_q.exp()
    rest_p, rest_q = ((1 - x.sum(-1)).clamp_min(1e-12) for x in (p, q))
    rest = rest_p * (rest_p.log() - rest_q.log())
    return ((p * (teacher_logprobs - log_q)).sum(-1) + rest).mean()


def tv(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    q, p = _softmaxes(student, teacher, temperature)
    return _mean_over_rows((q - p).abs() / 2)


def _collapse(probs: Tensor, target_mask: Tensor, other_mask: Tensor) -> Tensor:
    """Probabilities of the target class and of all others together."""
    target = (probs * target_mask).sum(dim=1, keepdim=True)
    others = (probs * other_mask).sum(dim=1, keepdim=True)
    return torch.cat([target, others], dim=1)


def _decouple(
    student: Tensor, teacher: Tensor, target: Tensor, temperature: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Student and teacher as [target, others], then as log and probabilities of the others."""
    index = target.unsqueeze(1)
    target_mask = torch.zeros_like(student).scatter_(1, index, 1).bool()
    other_mask = torch.ones_like(student).scatter_(1, index, 0).bool()
    q = F.softmax(student / temperature, dim=1)
    p = F.softmax(teacher / temperature, dim=1)
    q_pair = _collapse(q, target_mask, other_mask)
    p_pair = _collapse(p, target_mask, other_mask)
    p_others = F.softmax(teacher / temperature - 1000.0 * target_mask, dim=1)
    log_q_others = F.log_softmax(student / temperature - 1000.0 * target_mask, dim=1)
    return q_pair, p_pair, log_q_others, p_others


def dkd(
    student: Tensor,
    teacher: Tensor,
    target: Tensor,
    alpha: float = 1.0,
    beta: float = 8.0,
    temperature: float = 4.0,
) -> Tensor:
    q_pair, p_pair, log_q_others, p_others = _decouple(student, teacher, target, temperature)
    scale = temperature**2 / target.numel()
    tckd = F.kl_div(torch.log(q_pair), p_pair, reduction="sum") * scale
    nckd = F.kl_div(log_q_others, p_others, reduction="sum") * scale
    return alpha * tckd + beta * nckd


def aekt(
    student: Tensor,
    teacher: Tensor,
    target: Tensor,
    alpha: float = 1.0,
    beta: float = 8.0,
    temperature: float = 4.0,
    ratio_max: float = 10.0,
) -> Tensor:
    """DKD with each row's TCKD times the teacher/student ratio of the target, a constant."""
    q_pair, p_pair, log_q_others, p_others = _decouple(student, teacher, target, temperature)
    scale = temperature**2 / target.numel()
    ratio = (p_pair[:, :1] / q_pair[:, :1].detach()).clamp(max=ratio_max)
    tckd = (ratio * F.kl_div(torch.log(q_pair), p_pair, reduction="none")).sum() * scale
    nckd = F.kl_div(log_q_others, p_others, reduction="sum") * scale
    return alpha * tckd + beta * nckd


def _cosine(a: Tensor, b: Tensor, eps: float = 1e-8) -> Tensor:
    norms: Tensor = a.norm(dim=1) * b.norm(dim=1)
    return (a * b).sum(1) / (norms + eps)


def _pearson(a: Tensor, b: Tensor) -> Tensor:
    return _cosine(a - a.mean(1).unsqueeze(1), b - b.mean(1).unsqueeze(1))


def _inter(q: Tensor, p: Tensor) -> Tensor:
    return 1 - _pearson(q, p).mean()


def _relations(
    activation: Callable[[Tensor], Tensor],
    student: Tensor,
    teacher: Tensor,
    beta: float,
    gamma: float,
    tau: float,
) -> Tensor:
    if student.dim() == 4:
        classes = student.shape[1]
        student = student.transpose(1, 3).reshape(-1, classes)
        teacher = teacher.transpose(1, 3).reshape(-1, classes)
    q, p = activation(student / tau), activation(teacher / tau)
    inter = tau**2 * _inter(q, p)
    intra = tau**2 * _inter(q.transpose(0, 1), p.transpose(0, 1))
    return beta * inter + gamma * intra


def dist(
    student: Tensor, teacher: Tensor, beta: float = 1.0, gamma: float = 1.0, tau: float = 1.0
) -> Tensor:
    return _relations(lambda x: x.softmax(dim=1), student, teacher, beta, gamma, tau)


def sigmoid_dist(
    student: Tensor, teacher: Tensor, beta: float = 1.0, gamma: float = 1.0, tau: float = 1.0
) -> Tensor:
    return _relations(torch.sigmoid, student, teacher, beta, gamma, tau)


def sigmoid_kd(student: Tensor, teacher: Tensor, temperature: float = 4.0) -> Tensor:
    s, t = student / temperature, teacher / temperature
    p = t.sigmoid()
    cross, entropy = (F.binary_cross_entropy_with_logits(x, p, reduction="none") for x in (s, t))
    return _mean_over_rows(cross - entropy) * temperature * temperature


EAGER: dict[str, Callable[..., Tensor]] = {
    "kd": kd, "dkd": dkd, "aekt": aekt, "dist": dist, "sigmoid_kd": sigmoid_kd,
    "sigmoid_dist": sigmoid_dist, "reverse_kl": reverse_kl, "jsd": jsd,
    "mixed_kl": mixed_kl, "skew_kl": skew_kl, "skew_reverse_kl": skew_reverse_kl, "tv": tv,
    "alpha_beta": alpha_beta, "acceptance": acceptance,
    "sampled_kl": sampled_kl,
    "topk_kd": topk_kd,
    **embedding_eager.EAGER,
}  # fmt: skip


def eager(spec: LossSpec) -> Callable[..., Tensor]:
    """The eager form of a loss; a loss that has none here is represented by its reference."""
    written = EAGER.get(spec.name)
    if written is None:

        def reference(*args: Tensor) -> Tensor:
            return spec.function(*args, backend="reference")

        return reference
    form: Callable[..., Tensor] = written

    def loss(*args: Tensor) -> Tensor:
        # Under autocast softmax and kl_div run in float32, whatever the dtype of the logits.
        half = (torch.float16, torch.bfloat16)
        return form(*(x.float() if x.dtype in half else x for x in args))

    return loss
