"""Every study of timm: the real parsers, the trainer's own parts, two steps and a validation."""

import itertools
import json
from argparse import Namespace
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import timm
import torch
import torchvision
import yaml
from torch.utils.flop_counter import FlopCounterMode

from lskd_study.plan.plan import Plan, Run
from lskd_study.plan.recipes import catalogue, find_recipe
from lskd_study.plan.teacher_list import load_teachers
from lskd_study.study.checks import try_out
from lskd_study.study.engine import make_plan
from lskd_study.study.own_time import evaluate_on, open_session, train_on
from lskd_study.trainers import trainer_of
from timm_ls_kd.models import check_model_name, check_pretrained
from timm_ls_kd.trainer.arguments import parse_arguments
from timm_ls_kd.trainer.session import create_optimizer, create_scheduler

pytestmark = pytest.mark.integration

CLASSES = 6  # of the images that stand in for the data; smoothing 0.8 needs more than 5
SMALL = ("--img-size", "64", "--device", "cpu")
# A step does not depend on these.
SCHEDULE = {"epochs", "lr", "sched", "decay_milestones", "decay_epochs", "decay_rate"}
SCHEDULE |= {"warmup_epochs", "warmup_lr"}
HERE = {"batch_size": 2, "validation_batch_size": 2, "workers": 0, "amp": False, "pretrained": False}
STUDIES = [
    pytest.param(recipe, id=recipe.name)
    for recipe in catalogue()
    if recipe.kind == "study" and recipe.ecosystem != "fairseq"
]


@pytest.fixture(scope="module")
def stepped() -> set[str]:
    """Networks and trainers' files that have taken their steps, in whatever recipe came first."""
    return set()


@pytest.mark.parametrize("recipe", STUDIES)
def test_study(recipe, miniature, stepped, costs, tmp_path):
    whole = make_plan(str(recipe.path), None)
    data = costs.data_sets[Path(whole.data).name]
    assert whole.num_classes == data["classes"]
    runs = [run for run in whole.runs if recipe.ecosystem == "timm" or run.role == "teacher"]
    small = shrunk(replace(whole, runs=runs), miniature(CLASSES), tmp_path)
    try_out(small)  # at the real image size

    hours = 0.0
    for run, count in kinds(whole, runs):
        check_model_name(run.model, "model")
        args = arguments(whole, run)
        if args.pretrained:
            check_pretrained(run.model, reach=False)
        rates = learning_rates(args, data["train"])
        check_schedule(recipe.name, run, rates)
        teacher = operations(arguments(whole, whole.run(run.teacher))) if run.teacher else 0.0
        student = operations(args)
        backward = 0.0 if args.train_only else 2.0
        validation = data["val"] if args.val_split else 0
        hours += count * costs.hours(len(rates), data["train"], validation, student, teacher, backward)

        options = {key: value for key, value in small.configs[run.config].items() if key not in SCHEDULE}
        new = {run.model.partition(".")[0], run.role + json.dumps(options, sort_keys=True)} - stepped
        if new:
            two_steps_and_a_validation(small, small.run(run.id))
            stepped |= new
    if recipe.ecosystem == "timm":
        costs.check(recipe.name, hours)


def shrunk(plan: Plan, data: Path, folder: Path) -> Plan:
    """Return the plan on small data, without weights to start from; its files are written anew."""
    files = {path: folder / f"{number}.yaml" for number, path in enumerate(plan.configs)}
    configs = {path: plan.configs[path] | HERE for path in files}
    for path, content in configs.items():
        if path.endswith(".yaml"):
            content.pop("initial_checkpoint", None)
            files[path].write_text(yaml.safe_dump(content))
    runs = [replace(run, config=str(files[run.config])) for run in plan.runs]
    configs |= {str(files[path]): content for path, content in configs.items()}
    output = str(folder / "runs")
    return replace(plan, runs=runs, configs=configs, data=str(data), num_classes=CLASSES, output=output)


def kinds(plan: Plan, runs: list[Run]) -> list[tuple[Run, int]]:
    """Return a run of each kind, that with the most smoothing, and how many there are; seeds make no kind."""
    groups: dict[tuple[object, ...], list[Run]] = {}
    for run in sorted(runs, key=lambda run: -run.smoothing):
        teacher = plan.run(run.teacher).model if run.teacher else ""
        groups.setdefault((run.model, run.config, teacher, run.temperature, run.hard_weight), []).append(run)
    return [(members[0], len(members)) for members in groups.values()]


def arguments(plan: Plan, run: Run) -> Namespace:
    """Return what the trainer makes of a run's command line."""
    args = parse_arguments(trainer_of("timm", run.role).command(plan, run)[2:])
    args.world_size = 1
    return args


def learning_rates(args: Namespace, images: int) -> list[float]:
    """Return the real schedule's rate in each epoch."""
    updates = images // args.batch_size
    optimizer = create_optimizer(args, torch.nn.Linear(1, 1))
    scheduler, epochs = create_scheduler(args, optimizer, updates)
    rates = []
    for epoch in range(epochs):
        rates.append(optimizer.param_groups[0]["lr"])
        if scheduler is not None:
            scheduler.step_update((epoch + 1) * updates)
            scheduler.step(epoch + 1)
    return rates


def check_schedule(recipe: str, run: Run, rates: list[float]) -> None:
    """Appendix A: teachers 90 epochs, /10 every 30; students 200, x 0.1 at 80 and 160; Long 160."""
    folder, _, table = recipe.partition("/")
    if folder == "fashion_mnist":
        tenths = [0.1] * 5 + [0.01] * 2 + [0.001] * 3
        assert rates == pytest.approx([rate for rate in tenths for _ in range(len(rates) // 10)])
    if folder.startswith(("digits", "fashion_mnist")) or folder == "fixres":
        return
    short = run.role == "teacher" and folder in ("imagenet", "imagenet_100_500")
    first = 0.01 if run.model.endswith(".tv_in1k") else 0.1
    marks, epochs = ((30, 60), 90) if short else ((80, 160), 200)
    if short and "long" in table:
        marks, epochs = (53, 107), 160
    expected = [first / 10 ** sum(epoch >= mark for mark in marks) for epoch in range(epochs)]
    assert rates == pytest.approx(expected)


def operations(args: Namespace) -> float:
    """Return the operations of one image's forward pass."""
    return flops(args.model, args.img_size, args.in_chans)


@cache
def flops(model: str, img_size: int | None, channels: int | None) -> float:
    size = img_size or timm.get_pretrained_cfg(model).input_size[-1]
    with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
        timm.create_model(model, in_chans=channels or 3).eval()(torch.zeros(1, channels or 3, size, size))
    return counter.get_total_flops()


def two_steps_and_a_validation(plan: Plan, run: Run) -> None:
    session = open_session(plan, run, *SMALL)
    train_on(session, First(session.loader, 2))
    if session.loader_eval is not None:
        evaluate_on(session, First(session.loader_eval, 1))


class First:
    """The first batches of a loader."""

    def __init__(self, loader, count: int) -> None:
        self.loader, self.count, self.device = loader, count, loader.device

    def __len__(self) -> int:
        return self.count

    def __iter__(self):
        return itertools.islice(self.loader, self.count)


def test_a_resnet50_trains_at_the_published_speed(costs):
    """90 epochs of a ResNet-50 at 2,790 images/s are 11.5 hours on an H100."""
    hours = costs.hours(90, 1_281_167, 0, flops("resnet50", 224, 3))
    assert hours == pytest.approx(90 * 1_281_167 / 2790 / 3600, rel=0.01)


def test_teachers_to_measure_are_there():
    for entry in load_teachers(find_recipe("stability").path).teachers:
        library, _, name = entry.model.rpartition(":")
        if library:
            assert name in torchvision.models.list_models()
        else:
            check_model_name(name, "model")
