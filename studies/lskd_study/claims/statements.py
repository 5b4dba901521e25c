"""The claims, each a testable statement with its place in the paper. One table, ``CLAIMS``."""

from dataclasses import dataclass, field
from typing import Literal

Task = Literal["images", "binary", "translation"]
Role = Literal["teacher", "student", "trend"]
# What is estimated: see `judging` for the first four, `trends` and `several` for the others.
Contrast = Literal[
    "difference",  # smoothed minus baseline
    "hard-weight",  # fitted change of one arm from the smallest to the largest hard weight
    "gain-hard-weight",  # the same of the difference
    "gain-temperature",  # the difference above the lowest temperature minus that at the lowest
    "networks",  # fitted change over teacher networks
    "direction",  # whether the student's difference has the sign of the teacher's
    "gain-classes",  # over studies: fitted change of the difference for ten times the classes
    "gain-long-tail",  # over studies: the difference on long-tailed data minus that on others
]
IMAGES: tuple[Task, ...] = ("images", "binary")
EVERY: tuple[Task, ...] = ("images", "binary", "translation")


@dataclass(frozen=True)
class Claim:
    """A statement: a quantity, how it is contrasted, and the side of zero on which the result should lie.

    Attributes:
        id: the same for the same statement about images and translation.
        text: the statement.
        tested: what is tested of it, in words.
        source: table, figure or text of the paper, or another work.
        role: whose quantity it is; a trend is about several settings or networks.
        quantity: name as in `Result.per_sample` or `Result.value`.
        unit: of the estimate.
        direction: 1 or -1; 0 marks a part that is reported with its interval but is no claim.
        tasks: kinds of study that test it.
        contrast: what is estimated.
        whose: whose quantity a trend is about; elsewhere the same as ``role``.
        explained_by: of a trend over networks, the teacher's quantity that it is over.
        non_inferior: the null hypothesis is not zero, but that much worse (the study's margin).
    """

    id: str
    text: str
    tested: str
    source: str
    role: Role
    quantity: str
    unit: str
    direction: Literal[1, 0, -1]
    tasks: tuple[Task, ...] = IMAGES
    contrast: Contrast = "difference"
    whose: Literal["teacher", "student"] = field(default="student", kw_only=True)
    explained_by: str = field(default="", kw_only=True)
    non_inferior: bool = field(default=False, kw_only=True)

    @property
    def measured_on(self) -> Literal["teacher", "student"]:
        """Whose runs the quantity is taken from."""
        return self.whose if self.role == "trend" else self.role


CLAIMS = (
    Claim(
        "better-student",
        "A label-smoothed teacher distils a better student",
        "difference in the students’ top-1 accuracy is above 0",
        "Table 2",
        "student",
        "top1",
        "points",
        1,
        ("images",),
    ),
    Claim(
        "better-student",
        "A label-smoothed teacher distils a better binary student",
        "difference in the students’ top-1 accuracy is above 0; the paper compares one run of each kind",
        "Fig. 6",
        "student",
        "top1",
        "points",
        1,
        ("binary",),
    ),
    Claim(
        "better-student",
        "A label-smoothed teacher distils a student of higher BLEU",
        "difference in the students’ BLEU on the test set (sacreBLEU, detokenised) is above 0; the paper "
        "shows curves, without numbers or a margin",
        "Fig. 7, right",
        "student",
        "bleu",
        "points",
        1,
        ("translation",),
    ),
    Claim(
        "no-worse-student",
        "A label-smoothed teacher distils a student that is as good or better",
        "the students’ top-1 accuracy is not lower by as much as a margin; the paper names none",
        "Sec. 1, Fig. 6",
        "student",
        "top1",
        "points",
        1,
        non_inferior=True,
    ),
    Claim(
        "larger-loss",
        "The distillation loss of a smoothed teacher is larger",
        "difference in the training cross-entropy of the last epoch is above 0",
        "Fig. 5",
        "student",
        "train_ce",
        "nats",
        1,
        ("images",),
    ),
    Claim(
        "larger-loss",
        "The distillation loss of a smoothed teacher is larger",
        "difference in the training cross-entropy of the last epoch is above 0",
        "Fig. 6, left",
        "student",
        "train_ce",
        "nats",
        1,
        ("binary",),
    ),
    Claim(
        "larger-loss",
        "The distillation loss of a smoothed teacher is larger",
        "difference in the training cross-entropy of the last epoch is above 0; the paper shows this for "
        "images, not for translation",
        "Fig. 5",
        "student",
        "train_ce",
        "nats",
        1,
        ("translation",),
    ),
    Claim(
        "loss-part-kl",
        "of which: KL divergence from the teacher",
        "what the student has not learned",
        "Eq. 3",
        "student",
        "train_kl",
        "nats",
        0,
        EVERY,
    ),
    Claim(
        "loss-part-entropy",
        "of which: the teacher’s entropy",
        "what no student can go below",
        "Eq. 3",
        "student",
        "train_teacher_entropy",
        "nats",
        0,
        EVERY,
    ),
    Claim(
        "better-teacher",
        "Label smoothing raises the teacher’s accuracy",
        "difference in the teachers’ top-1 accuracy is above 0",
        "Tables 1, 4 and 7",
        "teacher",
        "top1",
        "points",
        1,
    ),
    Claim(
        "better-teacher",
        "Label smoothing raises the teacher’s BLEU",
        "difference in the teachers’ BLEU on the test set (sacreBLEU, detokenised) is above 0",
        "Fig. 7, left",
        "teacher",
        "bleu",
        "points",
        1,
        ("translation",),
    ),
    Claim(
        "no-worse-teacher",
        "A label-smoothed teacher is as good or better",
        "the teachers’ top-1 accuracy is not lower by as much as a margin; the paper names none",
        "Tables 1, 4 and 7",
        "teacher",
        "top1",
        "points",
        1,
        non_inferior=True,
    ),
    Claim(
        "long-tail",
        "On long-tailed data label smoothing makes the teacher worse",
        "difference in the teachers’ top-1 accuracy is below 0; data are called long-tailed here where the "
        "largest training class has at least 10 times the images of the smallest",
        "Table 3, Sec. 7",
        "teacher",
        "top1",
        "points",
        -1,
    ),
    Claim(
        "long-tail-head",
        "of which: many-shot classes, more than 100 training images",
        "the conjecture speaks of a bias to them; the bounds are those of Liu et al. 2019",
        "Sec. 7",
        "teacher",
        "top1_many_shot",
        "points",
        0,
    ),
    Claim(
        "long-tail-tail",
        "of which: few-shot classes, fewer than 20",
        "the same",
        "Sec. 7",
        "teacher",
        "top1_few_shot",
        "points",
        0,
    ),
    Claim(
        "lower-instability",
        "Label smoothing lowers the teacher’s 1−S (erases information within a class)",
        "difference in 1−S, Algorithm 1, is below 0",
        "Table 1",
        "teacher",
        "instability",
        "",
        -1,
    ),
    Claim(
        "similar-classes",
        "Label smoothing moves similar classes apart",
        "difference in the separation of each class from the one it is taken for most (by all teachers "
        "compared, both arms alike) is above 0: distance of the two classes’ means along the first axis of "
        "Fig. 1, the difference of their two logits, divided by the standard deviation within them; on "
        "validation images, the figure is of training images",
        "Fig. 1, Dc; Sec. 3",
        "teacher",
        "separation",
        "standard deviations",
        1,
    ),
    Claim(
        "worse-perplexity",
        "Label smoothing makes the teacher’s perplexity worse",
        "difference in the teachers’ validation perplexity, measured with hard labels at the epoch of the "
        "checkpoint whose BLEU is compared, is above 0; the paper says so in words, after Vaswani et al. "
        "2017, and prints no number",
        "text on Fig. 7",
        "teacher",
        "val_ppl",
        "perplexity",
        1,
        ("translation",),
    ),
    Claim(
        "same-direction",
        "As the teacher gains or loses by smoothing, so does the student",
        "the two differences in top-1 accuracy have one sign, the verdicts on each taken together, so it is "
        "no test of its own; shown is the students’ difference, counted in the direction of the teachers’",
        "Table 6, App. B",
        "trend",
        "top1",
        "points",
        1,
        contrast="direction",
    ),
    Claim(
        "better-teachers",
        "Better teachers teach better",
        "over teacher networks the slope of the student’s top-1 accuracy on the teacher’s is above 0",
        "Fig. 8, Tables 2, 6 and 8",
        "trend",
        "top1",
        "points per point",
        1,
        contrast="networks",
        explained_by="top1",
    ),
    Claim(
        "better-teachers",
        "Better teachers teach better",
        "over teacher networks the slope of the student’s BLEU on the teacher’s is above 0; the paper shows "
        "this for images",
        "Fig. 8",
        "trend",
        "bleu",
        "points per point",
        1,
        ("translation",),
        "networks",
        explained_by="bleu",
    ),
    Claim(
        "stability-follows-accuracy",
        "A more accurate teacher is more stable",
        "over teacher networks the slope of 1−S on top-1 accuracy is below 0",
        "Table 1, Sec. 5",
        "trend",
        "instability",
        "per point",
        -1,
        contrast="networks",
        whose="teacher",
        explained_by="top1",
    ),
    Claim(
        "more-hard-label",
        "The larger the weight of the hard labels, the worse the student",
        "change of the students’ top-1 accuracy from the smallest to the largest λ, on a line fitted to all, "
        "is below 0",
        "Table 9, App. E",
        "trend",
        "top1",
        "points",
        -1,
        contrast="hard-weight",
    ),
    Claim(
        "gain-over-hard-weight",
        "of which: how the gain by smoothing changes with it",
        "the same of the difference between the arms; the paper names no direction",
        "Table 9, App. E",
        "trend",
        "top1",
        "points",
        0,
        contrast="gain-hard-weight",
    ),
    Claim(
        "temperature",
        "A high temperature turns the gain by smoothing around",
        "difference in the students’ top-1 accuracy, on average over the higher temperatures, minus that at "
        "the lowest, is below 0; whether it is then a loss say the verdicts at each temperature",
        "Chandrasegaran et al. 2022",
        "trend",
        "top1",
        "points",
        -1,
        contrast="gain-temperature",
    ),
    Claim(
        "more-classes",
        "More classes shrink what the teacher gains by smoothing",
        "change of the difference in the teachers’ top-1 accuracy for ten times as many classes, on a line "
        "fitted over the logarithm of their number, is below 0; networks that all of the studies have, "
        "trained by the same file",
        "Table 4, Fig. 9, Sec. 7",
        "trend",
        "top1",
        "points",
        -1,
        contrast="gain-classes",
        whose="teacher",
    ),
    Claim(
        "long-tail-shrinks",
        "Long tails undo what the teacher gains by smoothing",
        "difference in the teachers’ top-1 accuracy on long-tailed data, minus that on data of as many "
        "classes without a long tail, is below 0; networks that all of the studies have",
        "Table 3, Sec. 7",
        "trend",
        "top1",
        "points",
        -1,
        contrast="gain-long-tail",
        whose="teacher",
    ),
)
OVER_STUDIES = ("gain-classes", "gain-long-tail")
