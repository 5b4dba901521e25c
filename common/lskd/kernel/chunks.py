"""The passes over chunks that the fused distillation loss is made of."""

import math
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from lskd.base.tensors import widened
from lskd.targets import check_labels
from lskd.terms import Rest, TopK, completed

Implementation = Literal["auto", "reference", "chunks", "native"]
"""What computes the loss; all give the same numbers to rounding.

``"reference"`` are the plain formulas of :func:`lskd.distillation_terms`, by autograd's own means, with
tensors of the logits' size and with second derivatives. ``"chunks"`` do the same in a loop over blocks of
rows, on any device. ``"native"`` is compiled code for one row after the other, on the CPU. ``"auto"`` takes
the native code where it can run, and the chunks elsewhere.
"""

# Of one chunk in float32: on a CPU what stays in its second-level cache, on a GPU what keeps it busy.
_CHUNK_ELEMENTS = {"cpu": 1 << 17}
_CHUNK_ELEMENTS_ELSEWHERE = 1 << 24


class Settings(NamedTuple):
    """What is asked of the loss, in types that a compiled graph can contain."""

    temperature: float
    soft_weight: float  # T^2 is in it
    hard_weight: float
    on: float  # of smoothed labels: the label's own mass, and each other's
    off: float
    rest: Rest
    mean: bool
    impl: Implementation

    def loss(self, cross_entropy: Any, hard_cross_entropy: Any) -> Any:
        """Return the weighted sum, of numbers or tensors."""
        # A part of weight 0 must not reach the loss: where it is infinite, 0 times it would be NaN.
        loss = self.soft_weight * cross_entropy if self.soft_weight > 0 else 0.0
        return loss + self.hard_weight * hard_cross_entropy if self.hard_weight > 0 else loss


class Samples(NamedTuple):
    """Which samples count, in one of two ways.

    Attributes:
        rows: on the CPU, the indices of those that count; None for all.
        mask: elsewhere, ``(N, 1)``, because to find the indices the device would have to be waited for.
        weight: of each sample in the loss: a number, or ``(N, 1)`` with 0 for what does not count.
    """

    rows: Tensor | None
    mask: Tensor | None
    weight: float | Tensor


def counting(mask: Tensor | None, samples: int, mean: bool) -> Samples:
    """Return which of the samples count, for a mean over them or a sum."""
    if mask is None:
        return Samples(None, None, 1 / max(samples, 1) if mean else 1.0)
    if on_cpu(mask):
        rows = mask.reshape(-1).nonzero().squeeze(-1)
        count = len(rows)
        return Samples(None if count == samples else rows, None, 1 / max(count, 1) if mean else 1.0)
    column = mask.reshape(-1, 1)
    weight = widened(column)
    return Samples(None, column, weight / weight.sum().clamp(min=1) if mean else weight)


def on_cpu(tensor: Tensor) -> bool:
    """Return whether numbers can be looked at without waiting for a device."""
    return tensor.device.type == "cpu"


def flatten(tensor: Tensor, samples: Samples, own_dimensions: int, filler: float | None = None) -> Tensor:
    """Return the samples one after the other, with the last ``own_dimensions`` as they are.

    Those that do not count are left out, or are ``filler`` where there is one.
    """
    flat = tensor.detach().reshape(-1, *tensor.shape[tensor.ndim - own_dimensions :])
    if samples.rows is not None:
        return flat[samples.rows]
    if samples.mask is not None and filler is not None:
        return torch.where(samples.mask if own_dimensions else samples.mask.squeeze(-1), flat, filler)
    return flat


class KnownTeacher:
    """A top-K teacher's distribution, ready for the chunks: all of it is small.

    ``log_p`` has a last column for each of the ``others`` classes where the rest is spread over them, and for
    them together where they are lumped.
    """

    def __init__(self, teacher: TopK, samples: Samples, classes: int, temperature: float) -> None:
        k = teacher.ids.shape[-1]
        self.ids = flatten(teacher.ids, samples, 1, 0).long()
        if samples.mask is not None:  # distinct, like everybody's
            self.ids = torch.where(samples.mask, self.ids, torch.arange(k, device=self.ids.device))
        check_labels(self.ids, classes, "top-K ids")
        # Log-probabilities as good as any stand where nothing counts.
        values = flatten(teacher.values, samples, 1, -math.log(2 * k))
        values = values.to(torch.promote_types(values.dtype, torch.float32))
        self.others = classes - k if teacher.rest in ("spread", "lump") else 0
        self.lumped = teacher.rest == "lump"
        self.best = self.ids.gather(-1, values.argmax(-1, keepdim=True))
        if self.others:
            self.log_p = widened(completed(values, classes, temperature)[0])
            p = self.log_p.exp()
            self.other: Tensor | None = p[..., k:]
            self.change = p[..., :k] - (0 if self.lumped else p[..., k:])
            if self.lumped:
                self.log_p[..., k:] += math.log(self.others)
                self.other = self.other * self.others
        else:
            self.log_p = (widened(values) / temperature).log_softmax(-1)
            self.other, self.change = None, self.log_p.exp()


# What is kept of each row, in this order; ``q = (x - max x) / T`` of the student, ``r`` of a dense teacher.
_TOP, _TEACHER_TOP, _SUM, _TEACHER_SUM, _DIFFERENCE, _TEACHER_R = range(6)
# With labels, and with a teacher that is spread:
_SUM_HARD, _SUM_Q, _LABEL_Q, _LABEL_SUM, _OTHER_Q, _OTHER_SUM = range(6, 12)


class Place:
    """Memory for one chunk after another, with the views of it that are needed: to make a view takes time."""

    def __init__(self, rows: int, classes: int, columns: int, like: Tensor, dtype: torch.dtype) -> None:
        buffers = torch.empty(4, rows, classes, dtype=dtype, device=like.device)
        self.q, self.p, self.r, self.e = buffers.unbind(0)
        self.left = torch.empty(columns, rows, 1, dtype=dtype, device=like.device)
        self.columns = self.left.unbind(0)
        self.sums = self.left[_SUM : _TEACHER_SUM + 1]
        self.best = torch.empty(2, rows, 1, dtype=torch.int64, device=like.device)
        self.bests = self.best.unbind(0)
        self.factors = torch.empty(2, rows, 1, dtype=dtype, device=like.device)
        self.student_factor, self.teacher_factor = self.factors.unbind(0)


class Work:
    """One forward pass: the passes over chunks, then the terms from what they left of each row."""

    def __init__(
        self,
        logits: Tensor,
        teacher: Tensor | KnownTeacher,
        labels: Tensor | None,
        samples: Samples,
        settings: Settings,
        wanted: bool,
    ) -> None:
        self.classes = logits.shape[-1]
        self.student = logits.reshape(-1, self.classes)
        self.known = teacher if isinstance(teacher, KnownTeacher) else None
        self.teacher = teacher.reshape(-1, self.classes) if isinstance(teacher, Tensor) else None
        self.labels, self.samples, self.settings = labels, samples, settings
        self.probabilities = labels is not None and labels.is_floating_point()
        self.count = len(self.student) if samples.rows is None else len(samples.rows)
        self.on_cpu = on_cpu(logits)
        self.dtype = torch.promote_types(logits.dtype, torch.float32)
        self.gradient = gradient_like(self.student, zeros=samples.rows is not None) if wanted else None
        self.columns = 6 if labels is None and self.known is None else 12
        self.left = torch.empty(self.columns, self.count, 1, dtype=self.dtype, device=logits.device)
        self.best = torch.empty(2, self.count, 1, dtype=torch.int64, device=logits.device)

    def run(self) -> None:
        """Go over the chunks."""
        rows, gradient = self.samples.rows, self.gradient
        limit = _CHUNK_ELEMENTS["cpu"] if self.on_cpu else _CHUNK_ELEMENTS_ELSEWHERE
        step = min(max(limit // max(self.classes, 1), 1), max(self.count, 1))
        direct = gradient is not None and rows is None and gradient.dtype == self.dtype
        place = self._place(step)
        # What is left of a chunk is copied: to look up where it belongs before each pass takes longer.
        kept = zip(torch.split(self.left, step, 1), torch.split(self.best, step, 1), strict=True)
        outs = torch.split(gradient, step) if gradient is not None and direct else None
        for index, (left, best) in enumerate(kept):
            count = left.shape[1]
            if count == 0:
                break
            if count < step:
                place = self._place(count)
            part = slice(index * step, index * step + count)
            at = part if rows is None else rows[part]
            out = place.e if outs is None else outs[index]
            self._chunk(place, part, at, out)
            left.copy_(place.left)
            best.copy_(place.best)
            if gradient is not None:
                self._gradient(place, part, at, out)
                if not direct:
                    gradient[at] = out.to(gradient.dtype)

    def _place(self, rows: int) -> Place:
        return Place(rows, self.classes, self.columns, self.student, self.dtype)

    def _chunk(self, place: Place, part: slice, at: slice | Tensor, out: Tensor) -> None:
        """Leave the sums of each row; exponentials of the student in ``out``, of the teacher in ``p``."""
        t, q, columns = self.settings.temperature, place.q, place.columns
        x = self._rows(self.student, part, at)
        _largest(x, columns[_TOP], place.bests[0])
        torch.sub(x, columns[_TOP], out=q)
        if self.labels is not None:
            self._look_at_labels(self.labels[part], q, out, columns)
        if t != 1:
            q.mul_(1 / t)
        torch.sum(torch.exp(q, out=out), -1, keepdim=True, out=columns[_SUM])
        if self.teacher is not None:
            r, p = place.r, place.p
            z = self._rows(self.teacher, part, at)
            _largest(z, columns[_TEACHER_TOP], place.bests[1])
            torch.sub(z, columns[_TEACHER_TOP], out=r)
            if t != 1:
                r.mul_(1 / t)
            torch.sum(torch.exp(r, out=p), -1, keepdim=True, out=columns[_TEACHER_SUM])
            # The difference first: the difference of two large sums would not be 0 for p = q.
            torch.sub(r, q, out=q)
            if not self.on_cpu or not p.amin() > 0:
                # Masked classes (logits of -inf) would make 0 * inf; 0 * log 0 is 0.
                nothing = p == 0
                q.masked_fill_(nothing, 0.0)
                r.masked_fill_(nothing, 0.0)
            _dot(q, p, columns[_DIFFERENCE])
            _dot(r, p, columns[_TEACHER_R])
        elif self.known is not None and self.known.others and self.known.lumped:
            # From their own largest: their sum may be far below that of all. What is left in q they share.
            top = torch.amax(q.scatter_(-1, self.known.ids[part], -math.inf), -1, keepdim=True)
            top.clamp_(min=torch.finfo(q.dtype).min)
            torch.sum(torch.exp(q.sub_(top), out=q), -1, keepdim=True, out=columns[_OTHER_SUM])
            torch.add(top, columns[_OTHER_SUM].log(), out=columns[_OTHER_Q])
        elif self.known is not None and self.known.others:
            q.scatter_(-1, self.known.ids[part], 0.0)
            torch.sum(q, -1, keepdim=True, out=columns[_OTHER_Q])

    def _gradient(self, place: Place, part: slice, at: slice | Tensor, out: Tensor) -> None:
        """Make the gradient of the chunk's rows of the exponentials in ``out``."""
        settings, t, weight = self.settings, self.settings.temperature, self.samples.weight
        columns, labels, known = place.columns, self.labels, self.known
        if isinstance(weight, Tensor):
            weight = weight[part].to(self.dtype)
        soft, hard = weight * (settings.soft_weight / t), weight * settings.hard_weight
        hardened = labels is not None and settings.hard_weight > 0
        taught = settings.soft_weight > 0  # if not, NaN of the teacher has no influence either
        if known is None:
            torch.reciprocal(place.sums, out=place.factors).mul_(soft)
        else:
            torch.reciprocal(columns[_SUM], out=place.student_factor).mul_(soft)
        if hardened and t == 1:
            place.student_factor.add_(hard / columns[_SUM])
        out.mul_(place.student_factor)
        if taught and known is None:
            out.addcmul_(place.p, place.teacher_factor, value=-1)
        elif taught and known is not None:
            if known.other is not None and known.lumped:
                share = (soft * known.other[part]).to(self.dtype) / columns[_OTHER_SUM]
                out.addcmul_(place.q, share.nan_to_num_(nan=0.0, posinf=0.0), value=-1)
            elif known.other is not None:
                out.sub_((soft * known.other[part]).to(self.dtype))
            out.scatter_add_(-1, known.ids[part], (-soft * known.change[part]).to(self.dtype))
        if labels is not None and hardened:
            if t != 1:
                x = self._rows(self.student, part, at)
                e = torch.exp(torch.sub(x, columns[_TOP], out=place.q), out=place.q)
                out.addcmul_(e, hard / columns[_SUM_HARD])
            self._subtract_labels(labels[part], out, hard)

    def _look_at_labels(self, labels: Tensor, q: Tensor, scratch: Tensor, left: tuple[Tensor, ...]) -> None:
        if self.probabilities:
            torch.sum(labels, -1, keepdim=True, dtype=self.dtype, out=left[_LABEL_SUM])
            torch.mul(labels, q, out=scratch).masked_fill_(labels == 0, 0.0)
            torch.sum(scratch, -1, keepdim=True, out=left[_LABEL_Q])
        elif self.settings.off > 0:
            torch.sum(q, -1, keepdim=True, out=left[_SUM_Q])
        if self.settings.temperature != 1:
            torch.sum(torch.exp(q, out=scratch), -1, keepdim=True, out=left[_SUM_HARD])

    def _subtract_labels(self, labels: Tensor, out: Tensor, hard: float | Tensor) -> None:
        on, off = self.settings.on, self.settings.off
        if self.probabilities:
            if isinstance(hard, Tensor):
                out.addcmul_(labels.to(self.dtype), hard, value=-1)
            else:
                out.sub_(labels, alpha=hard)
            return
        if off > 0:
            out.sub_(hard * off)
        change = torch.zeros_like(out[:, :1]).sub_(hard * (on - off))
        out.scatter_add_(-1, labels.unsqueeze(-1), change)

    def _rows(self, logits: Tensor, part: slice, at: slice | Tensor) -> Tensor:
        rows = logits[at]
        if rows.dtype != self.dtype:
            rows = rows.to(self.dtype)
        mask = self.samples.mask
        return rows if mask is None else torch.where(mask[part], rows, 0.0)

    def terms(self) -> Tensor:
        """Return loss, cross-entropy, KL, teacher entropy, hard cross-entropy, nll and agreement, reduced."""
        left = widened(self.left.squeeze(-1))
        logs = left[_SUM : _TEACHER_SUM + 1].log() if self.known is None else left[_SUM : _SUM + 1].log()
        if self.known is None:
            terms = left[_DIFFERENCE : _TEACHER_R + 1]
            kl, entropy = terms.unbind(0)  # yet the means of the difference, and of r, under the teacher
            terms.div_(left[_TEACHER_SUM])
            kl.add_(logs[0]).sub_(logs[1])
            torch.sub(logs[1], entropy, out=entropy)
            best = self.best[1]
        else:
            kl, entropy = self._known_terms(self.known, left, logs[0])
            terms = torch.stack([kl, entropy])
            best = self.known.best
        soft = self._reduced(terms)
        hard: list[float] | list[Tensor] = [math.nan, math.nan]
        if self.labels is not None:
            hard = self._reduced(self._hard_terms(self.labels, left, logs[0]))
        agreement = self._reduced((self.best[0] == best).view(1, -1))
        return self._loss_and_terms([soft[0] + soft[1], *soft, *hard, *agreement])

    def _reduced(self, terms: Tensor) -> list[float] | list[Tensor]:
        """Return the sum of each row of terms, weighted: numbers on the CPU, elsewhere scalars."""
        weight = self.samples.weight
        if isinstance(weight, Tensor):
            return list((terms * weight.squeeze(-1)).sum(-1).unbind(0))
        if self.on_cpu:
            return [weight * float(total) for total in terms.sum(-1).tolist()]
        return list((terms.sum(-1) * weight).unbind(0))

    def _loss_and_terms(self, terms: list[float] | list[Tensor]) -> Tensor:
        loss = self.settings.loss(terms[0], terms[3])
        if self.on_cpu:
            return torch.tensor([loss, *terms], dtype=self.dtype)
        # Filled on the device: to copy a number to it would wait.
        every = [
            term if isinstance(term, Tensor) else self.left.new_full((), term) for term in (loss, *terms)
        ]
        return torch.stack(every).to(self.dtype)

    def _known_terms(self, known: KnownTeacher, left: Tensor, log_sum: Tensor) -> tuple[Tensor, Tensor]:
        x = self._student_at(known.ids)
        log_q = (x - left[_TOP].unsqueeze(-1)) / self.settings.temperature - log_sum.unsqueeze(-1)
        mass, log_p = known.log_p.exp(), known.log_p
        if known.others:
            count = 1 if known.lumped else known.others
            mass = torch.cat([mass[..., :-1], count * mass[..., -1:]], -1)
            other = left[_OTHER_Q] / count - log_sum
            log_q = torch.cat([log_q, other.unsqueeze(-1)], -1)
        nothing = mass == 0
        entropy = -(mass * log_p).masked_fill_(nothing, 0.0).sum(-1)
        kl = (mass * (log_p - log_q)).masked_fill_(nothing, 0.0).sum(-1)
        return kl, entropy

    def _hard_terms(self, labels: Tensor, left: Tensor, log_sum: Tensor) -> Tensor:
        """Return the cross-entropy with the smoothed labels, and with the labels as they are."""
        settings = self.settings
        log_sum_hard = log_sum if settings.temperature == 1 else left[_SUM_HARD].log()
        if self.probabilities:
            hard = left[_LABEL_SUM] * log_sum_hard - left[_LABEL_Q]
            return torch.stack([hard, torch.full_like(hard, math.nan)])
        own = self._student_at(labels.unsqueeze(-1)).squeeze(-1)
        nll = log_sum_hard - (own - left[_TOP])
        if settings.off == 0:
            return torch.stack([nll, nll])
        everything = left[_SUM_Q] - self.classes * log_sum_hard
        return torch.stack([(settings.on - settings.off) * nll - settings.off * everything, nll])

    def _student_at(self, ids: Tensor) -> Tensor:
        rows, mask = self.samples.rows, self.samples.mask
        if rows is not None:
            return widened(self.student[rows.unsqueeze(-1), ids])
        found = widened(self.student.gather(-1, ids))
        return found if mask is None else torch.where(mask, found, 0.0)


def _largest(x: Tensor, values: Tensor, ids: Tensor) -> None:
    """Write the largest of each row, and which it is."""
    if on_cpu(x) and x.is_contiguous():
        # numpy's argmax is vectorised, torch's is not and takes five times as long.
        x.numpy().argmax(1, out=ids.numpy()[:, 0])
        torch.gather(x, -1, ids, out=values)
    else:
        torch.max(x, -1, keepdim=True, out=(values, ids))


def _dot(x: Tensor, y: Tensor, out: Tensor) -> None:
    """Write the dot product of each row of ``x`` with that of ``y``; ``x`` is used up."""
    if on_cpu(x):
        np.vecdot(x.numpy(), y.numpy(), out=out.numpy()[:, 0])
    else:
        torch.sum(x.mul_(y), -1, keepdim=True, out=out)


def gradient_like(logits: Tensor, *, zeros: bool) -> Tensor:
    """Return memory for a gradient, for float16 in float32: a loss scale comes before it is rounded."""
    if logits.dtype == torch.float16:
        make_half = torch.zeros_like if zeros else torch.empty_like
        return make_half(logits, dtype=torch.float32, memory_format=torch.contiguous_format)
    if on_cpu(logits) and logits.dtype == torch.float32:
        # numpy asks the system for large pages. Touching new memory in small ones takes a third of the time.
        make = np.zeros if zeros else np.empty
        return torch.from_numpy(make(tuple(logits.shape), np.float32))
    shape = torch.zeros_like if zeros else torch.empty_like
    return shape(logits, memory_format=torch.contiguous_format)
