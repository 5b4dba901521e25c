"""Settings chosen from the images: networks, image size, epochs, batch, rate, augmentation."""

import math
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from lskd import LskdError
from lskd_study.plan.plan import Plan, exact
from lskd_study.study.own_images import OwnImages
from timm_ls_kd.models import check_model_name

SMOOTHING = (0, 0.1)
SEEDS = (0, 1, 2, 3, 4)


# A teacher, a smaller student, and training images from which so many parameters are worth their time; the
# other student is like the teacher, as in the paper's Table 2. Largest first. The last are timm's smallest,
# with 0.2 to 0.4 million parameters.
LADDER = (
    ("resnet50", "resnet18", 50_000),
    ("resnet18", "resnet10t", 5_000),
    ("resnet10t", "test_resnet", 1_000),
    ("test_resnet", "test_byobnet", 0),
)
_SIZES = (32, 48, 64, 96, 128, 160, 224)
_LARGEST_ON_CPU = 96
FEWEST_EPOCHS = 5


class Asked(NamedTuple):
    """What the user decides of a study of one's own images; empty: as it is usual.

    Attributes:
        seeds: how many.
        smoothing: values of the teachers, the baseline among them.
        models: a teacher and its students; without students the teacher is its own.
    """

    seeds: int | None = None
    smoothing: tuple[float, ...] = ()
    models: tuple[str, ...] = ()

    @classmethod
    def read(cls, seeds: int | None, smoothing: str | None, models: str | None) -> "Asked":
        """Read the options of the command line.

        Raises:
            LskdError: for values that are no smoothing, and names that timm does not know.
        """
        try:
            values = tuple(map(float, smoothing.split(","))) if smoothing is not None else ()
        except ValueError:
            values = (math.nan,)
        if smoothing is not None and (len({*values}) < 2 or not all(0 <= value < 1 for value in values)):
            raise LskdError(
                "--smoothing must be two different numbers or more, from 0 to below 1, such as 0,0.1; got "
                f"{smoothing!r}"
            )
        names = tuple(name.strip() for name in models.split(",")) if models is not None else ()
        for name in names:
            check_model_name(name, "model")
        if len({*names[1:]}) < len(names[1:]):
            raise LskdError(f"--models names a student twice, in {models}")
        return cls(seeds, tuple(dict.fromkeys(values)), names)

    def differs(self, plan: Plan) -> str:
        """Return the first option that asks for something else than a plan has; empty where none does."""
        networks = [next(run.model for run in plan.runs if run.role == "teacher")]
        networks += dict.fromkeys(run.model for run in plan.runs if run.role == "student")
        if self.seeds and self.seeds != (plan.looks[0] if plan.looks else len(plan.seeds)):
            return "--seeds"
        if self.smoothing and sorted(self.smoothing) != plan.smoothing:
            return "--smoothing"
        return "--models" * bool(self.models and [*self.models[:1], *self.students] != networks)

    @property
    def students(self) -> tuple[str, ...]:
        """The students that were asked for."""
        return self.models[1:] or self.models


USUAL = Asked()


@dataclass(frozen=True)
class Choice:
    """What a study of one's own images is to do."""

    teacher: str
    students: tuple[str, ...]
    img_size: int
    epochs: int
    batch_size: int
    grey: bool
    gpu: bool
    workers: int
    seeds: tuple[int, ...] = SEEDS
    smoothing: tuple[float, ...] = SMOOTHING
    cut: str = ""  # what was made smaller, and why

    def describe(self) -> list[str]:
        """Return it in lines."""
        students = ", ".join(self.students)
        smoothing = ", ".join(map(exact, self.smoothing))
        lines = [
            f"teacher {self.teacher}, students {students}, without pretrained weights",
            f"smoothing {smoothing}; {len(self.seeds)} seeds",
            f"{self.epochs} epochs, batch {self.batch_size}, lr {self.lr:g}, images of {self.img_size} x "
            f"{self.img_size}, on the {'GPU' if self.gpu else 'CPU'}",
        ]
        return [*lines, self.cut] if self.cut else lines

    @property
    def lr(self) -> float:
        """Learning rate: the paper's 0.1 for a batch of 128 and more, in proportion below."""
        return 0.1 * min(1.0, self.batch_size / 128)

    def trainer_options(self) -> dict[str, Any]:
        """Return timm's options, the same for teachers and students."""
        # Said for all models, so that teacher and students see the same images and one store serves them all.
        options: dict[str, Any] = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}
        if self.grey:
            options = {"in_chans": 1, "mean": [0.5], "std": [0.5]}
        options |= {
            "interpolation": "bicubic",
            "img_size": self.img_size,
            "crop_pct": 1.0 if self.img_size < 96 else 0.875,
            "batch_size": self.batch_size,
            "validation_batch_size": 256,
            "workers": self.workers,
            "epochs": self.epochs,
            "sched": "multistep",
            "decay_milestones": [max(1, round(0.5 * self.epochs)), max(2, round(0.8 * self.epochs))],
            "decay_rate": 0.1,
            "warmup_epochs": 1,
            "warmup_lr": self.lr / 10,
            "lr": self.lr,
            "opt": "sgd",
            "momentum": 0.9,
            "weight_decay": 0.0001,
        }
        # Crops of 8 % of a small image show nothing; a mirrored digit or letter is another one or none.
        small = self.img_size < 96
        options |= {
            "scale": [0.6, 1.0] if small else [0.25, 1.0],
            "hflip": 0.0 if self.grey else 0.5,
            "color_jitter": 0.0 if self.grey else 0.4,
        }
        if self.gpu:
            options |= {"amp": True, "amp_dtype": "bfloat16", "channels_last": True}
        return options | {"checkpoint_hist": 1, "log_interval": 1000}


def candidates(images: OwnImages, gpu: bool, cores: int, asked: Asked = USUAL) -> list[Choice]:
    """Return settings to try, the most wanted first, the cheapest last."""
    # The size next to the shorter side, of two the smaller one: nothing is made up by enlarging.
    side = min(images.width, images.height, _SIZES[-1] if gpu else _LARGEST_ON_CPU)
    size = max((usual for usual in _SIZES if usual <= side), default=_SIZES[0])
    # The largest batch of which at least 16 are in an epoch, if there is one.
    batches = (256, 128, 64, 32, 16, 8) if gpu else (128, 64, 32, 16, 8)
    batch = next((usual for usual in batches if images.train >= 16 * usual), min(8, images.train))
    # Until 0.3 million images (on a GPU 6) have been seen.
    seen, most = (6_000_000, 90) if gpu else (300_000, 30)
    epochs = max(10, min(most, round(seen / images.train)))
    workers = max(1, min(8, cores)) if gpu else 0
    ladder: list[tuple[str, tuple[str, ...]]] = [(asked.models[0], asked.students)] if asked.models else []
    if not ladder:
        ladder = [(large, (small, large)) for large, small, least in LADDER if images.train >= least]
    sizes = [usual for usual in reversed(_SIZES) if usual < min(size, 96)]
    pairs = [(*pair, size) for pair in ladder] + [(*ladder[-1], usual) for usual in sizes]
    seeds = tuple(range(asked.seeds)) if asked.seeds else SEEDS
    smoothing = asked.smoothing or SMOOTHING
    return [
        Choice(teacher, students, pixels, epochs, batch, images.grey, gpu, workers, seeds, smoothing)
        for teacher, students, pixels in pairs
    ]


def shorter(choice: Choice, factor: float) -> Choice:
    """Return the same with this part of the epochs, but five."""
    epochs = max(min(FEWEST_EPOCHS, choice.epochs), min(choice.epochs - 1, int(choice.epochs * factor)))
    return replace(choice, epochs=epochs)


def with_what_was_cut(choice: Choice, wanted: Choice, hours: float) -> Choice:
    """Return a choice that says what of the wanted one it makes smaller."""
    pairs = [
        (f"{choice.epochs} epochs", wanted.epochs, choice.epochs),
        (f"teacher {choice.teacher}", wanted.teacher, choice.teacher),
        (f"images of {choice.img_size} px", wanted.img_size, choice.img_size),
    ]
    parts = [f"{text} instead of {before}" for text, before, after in pairs if before != after]
    if not parts:
        return choice
    why = f"to fit --hours {exact(hours)} and the memory of the machine"
    return replace(choice, cut=f"Cut {why}: {', '.join(parts)}.")
