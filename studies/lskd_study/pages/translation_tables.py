"""The result table of a translation study: both kinds of BLEU and perplexity, and one line per run."""

from collections.abc import Sequence
from dataclasses import dataclass

from lskd_study.base.text import Measured, cell, csv_text, escaped
from lskd_study.pages.tables import RUN_HEADER, TRAINING, arms_of, failed_lines, run_cells
from lskd_study.plan.plan import exact
from lskd_study.results.results import Results
from lskd_study.results.translation import TranslationResult

QUANTITIES = ("bleu", "tokenised_bleu", "perplexity")


@dataclass(frozen=True)
class Scores:
    """What one kind of model reached, over seeds.

    Attributes:
        bleu: test BLEU, sacreBLEU on detokenised text.
        tokenised_bleu: test BLEU on the text as the data was tokenised.
        perplexity: validation perplexity at the chosen epoch.
    """

    bleu: Measured
    tokenised_bleu: Measured
    perplexity: Measured

    @classmethod
    def of(cls, results: Sequence[TranslationResult], failed: int) -> "Scores":
        """Summarise one result per seed."""
        return cls(
            Measured.of([result.detokenised.value for result in results], failed),
            Measured.of([result.tokenised.value for result in results], failed),
            Measured.of([result.value("val_ppl") for result in results], failed),
        )

    def texts(self) -> list[str]:
        """Return the three as ``mean ± std``."""
        return [getattr(self, name).text(2) for name in QUANTITIES]


@dataclass(frozen=True)
class StudentScores:
    """A kind of student of one teacher."""

    model: str
    temperature: float
    hard_weight: float
    scores: Scores


@dataclass(frozen=True)
class TeacherScores:
    """A kind of teacher with its students."""

    model: str
    smoothing: float
    scores: Scores
    students: list[StudentScores]


@dataclass(frozen=True)
class Signatures:
    """How the two kinds of BLEU were computed, in sacreBLEU's notation."""

    bleu: str
    tokenised_bleu: str


def signatures(results: Results[TranslationResult]) -> Signatures:
    """Return how the BLEU of a study was computed."""
    for result in results.finished.values():
        return Signatures(result.detokenised.signature, result.tokenised.signature)
    return Signatures("", "")


def translation_rows(results: Results[TranslationResult]) -> list[TeacherScores]:
    """Return the table of a study, in the order of its file."""
    return [
        TeacherScores(
            arm.model,
            arm.smoothing,
            Scores.of(arm.teachers, arm.failed),
            [
                StudentScores(s.model, s.temperature, s.hard_weight, Scores.of(s.results, s.failed))
                for s in arm.students
            ],
        )
        for arm in arms_of(results)
    ]


def markdown(rows: Sequence[TeacherScores], how: Signatures) -> str:
    """Return the table as Markdown, the signatures below it."""
    kinds = ("BLEU", "tokenised BLEU", "perplexity")
    header = ["Teacher", "α", *(f"Teacher {kind}" for kind in kinds), "Student", "T", "λ"]
    header += [*(f"Student {kind}" for kind in kinds), "Seeds"]
    lines = [f"| {' | '.join(header)} |", "|---" * len(header) + "|"]
    for row in rows:
        first = [escaped(row.model), exact(row.smoothing), *row.scores.texts()]
        for student in row.students:
            own = [escaped(student.model), exact(student.temperature), exact(student.hard_weight)]
            cells = [*first, *own, *student.scores.texts(), str(student.scores.bleu.seeds)]
            lines.append(f"| {' | '.join(cells)} |")
            first = [""] * len(first)
    lines += [
        "",
        "Mean ± standard deviation over seeds, checkpoint with the best validation BLEU.",
        "",
        f"- BLEU: test set, sacreBLEU on detokenised text, `{how.bleu}`",
        f"- tokenised BLEU: test set, as the data was tokenised, `{how.tokenised_bleu}`",
        "- perplexity: validation set, hard labels, per target token (subword)",
    ]
    return "\n".join(lines) + "\n"


def table_csv(rows: Sequence[TeacherScores]) -> str:
    """Return the table as CSV, full precision, one line per teacher and student."""
    header = ["teacher", "smoothing", "student", "temperature", "hard_weight", "seeds", "failed"]
    header += [
        f"{role}_{name}_{part}"
        for role in ("teacher", "student")
        for name in QUANTITIES
        for part in ("mean", "std")
    ]
    lines: list[list[object]] = []
    for row in rows:
        for s in row.students:
            kind = [row.model, row.smoothing, s.model, s.temperature, s.hard_weight]
            kind += [s.scores.bleu.seeds, s.scores.bleu.failed]
            measured = [getattr(scores, name) for scores in (row.scores, s.scores) for name in QUANTITIES]
            lines.append([*kind, *(cell(number) for item in measured for number in (item.mean, item.std))])
    return csv_text(header, lines)


def runs_csv(results: Results[TranslationResult]) -> str:
    """Return one line per run that ended: validation at the best epoch, training at the last; or why not."""
    validation = ("val_bleu", "val_loss", "val_ppl")
    header = [*RUN_HEADER, "bleu", "tokenised_bleu", "chosen_epoch", *validation, *TRAINING]
    header += ["wall_time_s", "resumed", "bleu_signature", "tokenised_bleu_signature", "failed"]
    lines: list[list[object]] = []
    for result in results.finished.values():
        both, job = (result.detokenised, result.tokenised), result.job
        cells: list[object] = [cell(kind.value) for kind in both]
        cells.append(int(result.curves["epoch"][result.chosen]))
        cells += [cell(result.value(name)) for name in (*validation, *TRAINING)]
        cells += [job["wall_time_s"], job["resumed"], *(kind.signature for kind in both), ""]
        lines.append([*run_cells(result.run), *cells])
    return csv_text(header, lines + failed_lines(results, header))
