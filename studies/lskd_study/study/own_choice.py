"""Settings chosen from the images: networks, image size, epochs, batch, rate, augmentation."""

from dataclasses import dataclass, replace
from typing import Any

from lskd_study.plan.plan import exact
from lskd_study.study.own_images import OwnImages

SMOOTHING = (0, 0.1)
SEEDS = (0, 1, 2)


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


@dataclass(frozen=True)
class Choice:
    """What a study of one's own images is to do."""

    teacher: str
    students: tuple[str, str]
    img_size: int
    epochs: int
    batch_size: int
    grey: bool
    gpu: bool
    workers: int
    cut: str = ""  # what was made smaller, and why

    def describe(self) -> list[str]:
        """Return it in lines."""
        students = ", ".join(self.students)
        lines = [
            f"teacher {self.teacher}, students {students}, without pretrained weights",
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


def candidates(images: OwnImages, gpu: bool, cores: int) -> list[Choice]:
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
    pairs = [(teacher, smaller, size) for teacher, smaller, least in LADDER if images.train >= least]
    sizes = [usual for usual in reversed(_SIZES) if usual < min(size, 96)]
    pairs += [(*LADDER[-1][:2], usual) for usual in sizes]
    return [
        Choice(teacher, (smaller, teacher), pixels, epochs, batch, images.grey, gpu, workers)
        for teacher, smaller, pixels in pairs
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
