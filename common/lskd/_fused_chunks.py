"""The passes over chunks that the fused distillation loss is made of."""

import math
from dataclasses import dataclass
from typing import cast

import numpy as np
import torch
from torch import Tensor

from lskd._losses import Rest, TopK, completed, distillation_terms
from lskd._targets import check_labels

# Of one chunk in float32: on a processor what stays in its second-level cache, on a GPU what keeps it busy.
_CHUNK_ELEMENTS = {"cpu": 1 << 17}
_CHUNK_ELEMENTS_ELSEWHERE = 1 << 24


@dataclass(frozen=True)
class Settings:
    """What the loss is made with; ``scale`` is 1, or 1 over the number of samples."""

    temperature: float
    soft_weight: float  # T^2 is in it
    hard_weight: float
    on: float  # of smoothed labels: the label's own mass, and each other's
    off: float
    scale: float


def flatten(tensor: Tensor, rows: Tensor | None, own_dimensions: int) -> Tensor:
    """Return the rows that count, one after the other, with the last ``own_dimensions`` as they are."""
    flat = tensor.detach().reshape(-1, *tensor.shape[tensor.ndim - own_dimensions :])
    return flat if rows is None else flat[rows]


class KnownTeacher:
    """A top-K teacher's distribution, ready for the chunks: all of it is small.

    ``log_p`` has a last column for each of the ``others`` classes where the rest is spread over them.
    """

    def __init__(self, teacher: TopK, rows: Tensor | None, classes: int, temperature: float) -> None:
        self.ids = flatten(teacher.ids, rows, 1).long()
        self.values = flatten(teacher.values, rows, 1)
        self.rest: Rest = teacher.rest
        check_labels(self.ids, classes, "top-K ids")
        values = self.values.to(torch.promote_types(self.values.dtype, torch.float32))
        k = self.ids.shape[-1]
        self.others = classes - k if teacher.rest == "spread" else 0
        self.best = self.ids.gather(-1, values.argmax(-1, keepdim=True))
        if self.others:
            self.log_p = completed(values, classes, temperature)[0].double()
            p = self.log_p.exp()
            self.other: Tensor | None = p[..., k:]
            self.change = p[..., :k] - p[..., k:]
        else:
            self.log_p = (values.double() / temperature).log_softmax(-1)
            self.other, self.change = None, self.log_p.exp()


class Work:
    """One forward pass: the passes over chunks, then the terms from what they left of each row.

    Names: ``q = (x - max x) / T`` of the student, ``r`` the same of a dense teacher.
    """

    def __init__(
        self,
        logits: Tensor,
        teacher: Tensor | KnownTeacher,
        labels: Tensor | None,
        rows: Tensor | None,
        settings: Settings,
        wanted: bool,
    ) -> None:
        self.classes = logits.shape[-1]
        self.student = logits.reshape(-1, self.classes)
        self.teacher = teacher.detach().reshape(-1, self.classes) if isinstance(teacher, Tensor) else teacher
        self.labels, self.rows, self.settings = labels, rows, settings
        self.count = len(self.student) if rows is None else len(rows)
        self.device = logits.device
        self.dtype = torch.promote_types(logits.dtype, torch.float32)
        self.gradient = _like(self.student, zeros=rows is not None) if wanted else None
        # Of each row: largest logits, sums of exponentials, sums of products, and the largest class.
        self.top = self._rows()
        self.sum = self._rows()
        self.sum_hard = self.sum if settings.temperature == 1 else self._rows()
        self.sum_q = self._rows()
        self.best = torch.empty(self.count, 1, dtype=torch.int64, device=self.device)
        self.teacher_sum, self.teacher_r, self.teacher_difference = (self._rows() for _ in range(3))
        self.teacher_best = torch.empty_like(self.best)

    def run(self) -> None:
        """Go over the chunks."""
        limit = _CHUNK_ELEMENTS.get(self.device.type, _CHUNK_ELEMENTS_ELSEWHERE)
        step = min(max(1, limit // max(self.classes, 1)), max(self.count, 1))
        buffers = torch.empty(4, step, self.classes, dtype=self.dtype, device=self.device)
        gradient = self.gradient
        direct = gradient is not None and self.rows is None and gradient.dtype == self.dtype
        for start in range(0, self.count, step):
            part = slice(start, min(start + step, self.count))
            at = part if self.rows is None else self.rows[part]
            scratch = buffers[:, : part.stop - start]
            out = gradient[part] if gradient is not None and direct else scratch[0]
            self._chunk(part, at, out, scratch[1:])
            if gradient is not None and not direct:
                gradient[at] = out.to(gradient.dtype)

    def _chunk(self, part: slice, at: slice | Tensor, out: Tensor, scratch: Tensor) -> None:
        settings, (q, p, r) = self.settings, scratch
        t, wanted = settings.temperature, self.gradient is not None
        x = self.student[at].to(self.dtype)
        _largest(x, self.top[part], self.best[part])
        torch.sub(x, self.top[part], out=q)
        labelled = self.labels is not None and not self.labels.is_floating_point()
        if labelled and settings.off > 0:
            torch.sum(q, -1, keepdim=True, out=self.sum_q[part])
        hard = self.labels is not None and settings.hard_weight > 0 and wanted
        if t != 1:
            if self.labels is not None:
                torch.sum(torch.exp(q, out=out), -1, keepdim=True, out=self.sum_hard[part])
            q.mul_(1 / t)
        torch.sum(torch.exp(q, out=out), -1, keepdim=True, out=self.sum[part])
        soft = settings.scale * settings.soft_weight / t
        factor = soft + (settings.scale * settings.hard_weight if hard and t == 1 else 0.0)
        if isinstance(self.teacher, Tensor):
            z = self.teacher[at].to(self.dtype)
            largest = torch.empty_like(self.top[part])
            _largest(z, largest, self.teacher_best[part])
            torch.sub(z, largest, out=r)
            if t != 1:
                r.mul_(1 / t)
            torch.sum(torch.exp(r, out=p), -1, keepdim=True, out=self.teacher_sum[part])
            # The difference first: the difference of two large sums would not be 0 for p = q.
            difference = torch.sub(r, q, out=q).mul_(p)
            torch.sum(difference, -1, keepdim=True, out=self.teacher_difference[part])
            torch.sum(r.mul_(p), -1, keepdim=True, out=self.teacher_r[part])
            if wanted:
                out.mul_(factor / self.sum[part]).addcmul_(p, soft / self.teacher_sum[part], value=-1)
        elif wanted:
            out.mul_(factor / self.sum[part])
            known = self.teacher
            if known.other is not None:
                out.sub_((soft * known.other[part]).to(self.dtype))
            out.scatter_add_(-1, known.ids[part], (-soft * known.change[part]).to(self.dtype))
        if hard:
            self._add_hard_gradient(x, part, out, scratch[0])

    def _add_hard_gradient(self, x: Tensor, part: slice, out: Tensor, scratch: Tensor) -> None:
        settings, labels = self.settings, cast(Tensor, self.labels)[part]
        weight = settings.scale * settings.hard_weight
        if settings.temperature != 1:
            e = torch.exp(torch.sub(x, self.top[part], out=scratch), out=scratch)
            out.addcmul_(e, weight / self.sum_hard[part])
        if labels.is_floating_point():
            out.sub_(labels, alpha=weight)
            return
        if settings.off > 0:
            out.sub_(weight * settings.off)
        change = torch.full_like(self.top[part], -weight * (settings.on - settings.off))
        out.scatter_add_(-1, labels.unsqueeze(-1), change)

    def terms(self) -> tuple[Tensor, ...]:
        """Return cross-entropy, KL, teacher entropy, hard cross-entropy, nll and agreement, reduced."""
        soft = self._dense_terms() if isinstance(self.teacher, Tensor) else self._known_terms(self.teacher)
        unusual = ~torch.isfinite(soft).all(0)
        if unusual.any():
            # Masked classes (logits of -inf) make 0 * inf above; the plain formulas know 0 * log 0 = 0.
            self._redo(soft, unusual.nonzero().squeeze(-1))
        agree = self.best == (self.teacher_best if isinstance(self.teacher, Tensor) else self.teacher.best)
        hard, nll = self._hard_terms()
        sums = torch.stack([*soft.sum(-1), hard, nll, agree.sum().double()]) * self.settings.scale
        return tuple(term.clone() for term in sums.to(self.dtype))

    def _dense_terms(self) -> Tensor:
        inverse = 1 / self.teacher_sum.double()
        log_sum = self.teacher_sum.double().log()
        entropy = log_sum - self.teacher_r.double() * inverse
        kl = self.teacher_difference.double() * inverse - log_sum + self.sum.double().log()
        return torch.stack([kl + entropy, kl, entropy]).squeeze(-1)

    def _known_terms(self, known: KnownTeacher) -> Tensor:
        x = self._student_at(known.ids)
        log_q = (x - self.top.double()) / self.settings.temperature - self.sum.double().log()
        mass, log_p = known.log_p.exp(), known.log_p
        if known.others:
            mass = torch.cat([mass[..., :-1], known.others * mass[..., -1:]], -1)
            everything = self._sum_of_logits() / self.settings.temperature
            lot = everything - self.classes * (
                self.top.double() / self.settings.temperature + self.sum.double().log()
            )
            log_q = torch.cat([log_q, (lot - log_q.sum(-1, keepdim=True)) / known.others], -1)
        entropy = -(mass * log_p).sum(-1)
        kl = (mass * (log_p - log_q)).sum(-1)
        return torch.stack([kl + entropy, kl, entropy])

    def _hard_terms(self) -> tuple[Tensor, Tensor]:
        nothing = torch.full((), math.nan, dtype=torch.float64, device=self.device)
        settings, labels = self.settings, self.labels
        if labels is None:
            return nothing, nothing
        if labels.is_floating_point():
            student = self.student if self.rows is None else self.student[self.rows]
            log_q = student.to(self.dtype).log_softmax(-1)
            return -torch.where(labels == 0, 0.0, labels * log_q).sum(-1).double().sum(), nothing
        log_sum = self.top.double() + self.sum_hard.double().log()
        nll = (log_sum - self._student_at(labels.unsqueeze(-1))).sum()
        if settings.off == 0:
            return nll, nll
        everything = self.sum_q.double() - self.classes * self.sum_hard.double().log()
        return (settings.on - settings.off) * nll - settings.off * everything.sum(), nll

    def _redo(self, soft: Tensor, unusual: Tensor) -> None:
        limit = _CHUNK_ELEMENTS.get(self.device.type, _CHUNK_ELEMENTS_ELSEWHERE)
        for rows in torch.split(unusual, max(1, limit // max(self.classes, 1))):
            at = rows if self.rows is None else self.rows[rows]
            if isinstance(self.teacher, Tensor):
                teacher: Tensor | TopK = self.teacher[at]
            else:
                teacher = TopK(self.teacher.values[rows], self.teacher.ids[rows], self.teacher.rest)
            exact = distillation_terms(self.student[at], teacher, self.settings.temperature)
            soft[:, rows] = torch.stack(exact).double()

    def _student_at(self, ids: Tensor) -> Tensor:
        if self.rows is None:
            return self.student.gather(-1, ids).double()
        return self.student[self.rows.unsqueeze(-1), ids].double()

    def _sum_of_logits(self) -> Tensor:
        sums = self.student.sum(-1, keepdim=True, dtype=self.dtype).double()
        return sums if self.rows is None else sums[self.rows]

    def _rows(self) -> Tensor:
        return torch.empty(self.count, 1, dtype=self.dtype, device=self.device)


def _largest(x: Tensor, values: Tensor, ids: Tensor) -> None:
    """Write the largest of each row, and which it is."""
    if x.device.type == "cpu" and x.is_contiguous():
        # numpy's argmax is vectorised, torch's is not and takes five times as long.
        x.numpy().argmax(1, out=ids.numpy()[:, 0])
        torch.gather(x, -1, ids, out=values)
    else:
        torch.max(x, -1, keepdim=True, out=(values, ids))


def _like(logits: Tensor, *, zeros: bool) -> Tensor:
    """Return memory for a gradient, for float16 in float32: a loss scale comes before it is rounded."""
    if logits.dtype == torch.float16:
        make_half = torch.zeros_like if zeros else torch.empty_like
        return make_half(logits, dtype=torch.float32, memory_format=torch.contiguous_format)
    if logits.device.type == "cpu" and logits.dtype == torch.float32:
        # numpy asks the system for large pages. Touching new memory in small ones takes a third of the time.
        make = np.zeros if zeros else np.empty
        return torch.from_numpy(make(tuple(logits.shape), np.float32))
    shape = torch.zeros_like if zeros else torch.empty_like
    return shape(logits, memory_format=torch.contiguous_format)
