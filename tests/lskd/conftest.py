"""Independent references: float64 NumPy and SciPy, written from the definitions, slow and plain."""

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import special
from torch import Tensor

from lskd.kernel import native
from lskd.soft_labels.format import Manifest

Array = NDArray[np.float64]


class Reference:
    """What the core should give, for arrays of float64."""

    @staticmethod
    def targets(labels: NDArray[np.int64], num_classes: int, alpha: float, convention: str) -> Array:
        rows = np.empty((*labels.shape, num_classes))
        for index, label in np.ndenumerate(labels):
            for c in range(num_classes):
                hit = float(c == label)
                if convention == "uniform":  # (1 - alpha) * one-hot + alpha * uniform
                    rows[(*index, c)] = (1 - alpha) * hit + alpha / num_classes
                elif hit:
                    rows[(*index, c)] = 1 - alpha
                else:
                    rows[(*index, c)] = alpha / (num_classes - 1)
        return rows

    @staticmethod
    def log_probabilities(logits: Array, temperature: float = 1.0) -> Array:
        return special.log_softmax(np.asarray(logits, np.float64) / temperature, axis=-1)

    @staticmethod
    def terms_of(probabilities: Array, student_log: Array) -> tuple[Array, Array, Array]:
        """Cross-entropy, KL(teacher || student), teacher entropy, from the definitions of the three sums."""
        present = probabilities > 0
        logs = np.where(present, student_log, 0.0)
        cross_entropy = -(probabilities * logs).sum(-1)
        log_p = np.log(np.where(present, probabilities, 1.0))
        kl = (probabilities * (log_p - logs)).sum(-1)
        return cross_entropy, kl, special.entr(probabilities).sum(-1)

    @classmethod
    def terms(cls, student: Array, teacher: Array, temperature: float) -> tuple[Array, Array, Array]:
        probabilities = special.softmax(np.asarray(teacher, np.float64) / temperature, axis=-1)
        return cls.terms_of(probabilities, cls.log_probabilities(student, temperature))

    @staticmethod
    def completed(values: Array, ids: NDArray[np.int64], num_classes: int, rest: str, t: float) -> Array:
        """The whole distribution of a top-K teacher at temperature 1, then tempered by a power."""
        rows = np.zeros((*ids.shape[:-1], num_classes))
        for index in np.ndindex(*ids.shape[:-1]):
            row = values[index].astype(np.float64)
            if rest in ("renormalise", "restrict"):
                known, other = special.softmax(row), 0.0
            else:
                known = np.exp(row)
                others = num_classes - len(row)
                other = max(1 - known.sum(), 0.0) / others if others else 0.0
            rows[index] = other
            rows[index][ids[index]] = known
        tempered = rows ** (1 / t)
        return tempered / tempered.sum(-1, keepdims=True)

    @classmethod
    def top_k_terms(
        cls, student: Array, values: Array, ids: NDArray[np.int64], rest: str, t: float
    ) -> tuple[Array, Array, Array]:
        """The terms of a top-K teacher, from the two distributions that each way of the rest compares."""
        classes = student.shape[-1]
        teacher = cls.completed(values, ids, classes, "spread" if rest == "lump" else rest, t)
        student_log = cls.log_probabilities(student, t)
        if rest in ("renormalise", "spread"):
            return cls.terms_of(teacher, student_log)
        known, log_known = (np.take_along_axis(rows, ids, -1) for rows in (teacher, student_log))
        if rest == "restrict":
            log_known = log_known - special.logsumexp(log_known, axis=-1, keepdims=True)
        elif ids.shape[-1] < classes:
            others = np.ones(student.shape, bool)
            np.put_along_axis(others, ids, False, -1)
            rest_log = special.logsumexp(np.where(others, student_log, -np.inf), axis=-1, keepdims=True)
            rest_mass = (teacher * others).sum(-1, keepdims=True)
            known = np.concatenate([known, rest_mass], -1)
            log_known = np.concatenate([log_known, rest_log], -1)
        return cls.terms_of(known, log_known)

    @staticmethod
    def class_values(
        logits: Array, labels: NDArray[np.int64], num_classes: int, definition: str
    ) -> dict[int, float]:
        """Each class' own value; a class that cannot count is missing."""
        probabilities = special.softmax(np.asarray(logits, np.float64), axis=1)
        values = {}
        for c in range(num_classes):
            rows = probabilities[labels == c]
            if definition == "target_std" and len(rows) >= 2:
                own = rows[:, c]
                values[c] = np.sqrt(((own - own.mean()) ** 2).sum() / (len(own) - 1))
            elif definition == "vector_l2" and len(rows) >= 2:
                values[c] = np.mean([np.sqrt(((row - rows.mean(0)) ** 2).sum()) for row in rows])
            elif definition == "between_vector_l2" and len(rows):
                values[c] = np.sqrt(((rows.mean(0) - probabilities.mean(0)) ** 2).sum())
            elif definition == "between_target_std" and len(rows):
                values[c] = rows[:, c].mean()
        return values

    @classmethod
    def every_class(cls, logits: Tensor, labels: Tensor, num_classes: int, definition: str) -> Array:
        values = cls.class_values(logits.double().numpy(), labels.numpy(), num_classes, definition)
        return np.array([values.get(c, np.nan) for c in range(num_classes)])

    @classmethod
    def stability(cls, logits: Array, labels: NDArray[np.int64], num_classes: int, definition: str) -> float:
        values = np.array(list(cls.class_values(logits, labels, num_classes, definition).values()))
        if definition == "between_target_std":
            return 1 - values.std(ddof=1) if len(values) > 1 else np.nan
        return 1 - values.mean() if len(values) else np.nan


@pytest.fixture(scope="session")
def reference() -> type[Reference]:
    return Reference


ROOT = Path(__file__).parents[2]
_manifest = Manifest.__init__


@pytest.fixture
def small_blocks(monkeypatch):
    """Give stores blocks of 40 bytes, so that a few rows fill many; the size is part of each store."""

    def small(self, *arguments, **named):
        _manifest(self, *arguments, **({"block_bytes": 40} | named))

    monkeypatch.setattr(Manifest, "__init__", small)


@pytest.fixture(scope="session")
def compile_loss(tmp_path_factory, compile_source):
    """Compile the loss by the build's own hook, whatever the installation contains."""

    def compiled(*flags):
        library = tmp_path_factory.mktemp("compiled") / native.LIBRARY
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("CC", " ".join(["cc", *flags]))
            assert not compile_source(ROOT / "common" / "lskd" / "kernel" / "rows.c", library)
        return native.load(library)

    return compiled


@pytest.fixture(scope="session")
def compiled_loss(compile_loss):
    return compile_loss()
