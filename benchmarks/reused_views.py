"""What reusing stored views costs: students of M views of each image, against those of a view an epoch.

lskd data digits && python benchmarks/reused_views.py digits --seeds 5
lskd data fashion-mnist SOURCE                                                  # where the four files are
lskd data long-tail data/fashion_mnist --head 500 --tail 500 --output data/fashion
python benchmarks/reused_views.py fashion

For each seed a teacher is trained and its answers to a view an epoch are stored once: students of M views
read the first M in turn. All students of a seed start from the same weights and have the same order, so that
differences are taken within seeds. A run that was cut is begun again, and one that is finished is kept. On
one idle core: 3 minutes a seed for the digits, 7 for Fashion-MNIST. Prints, and writes <data>.csv: top-1 and
cross-entropy on the test images after the last epoch, their standard errors over the seeds, and the
difference to "all" with its 95 % interval.
"""

import argparse
import csv
import multiprocessing
from pathlib import Path

import numpy as np

from lskd_study.stats.intervals import seed_interval
from timm_ls_kd import cli
from timm_ls_kd.trainer import main as _warm  # noqa: F401 - once, for all runs, which are forked from here

COMMON = """--in-chans 1 --mean 0.5 --std 0.5 --crop-pct 1 --workers 0 --num-classes 10 --smoothing 0
    --opt sgd --momentum 0.9 --weight-decay 0.0001 --sched multistep --decay-rate 0.1 --warmup-epochs 0
    --scale 0.7 1 --ratio 0.85 1.18 --color-jitter 0 --reprob 0.25
    --validation-batch-size 256 --checkpoint-hist 1 --log-interval 1000"""
DATA = {
    "digits": """--epochs 20 --val-interval 20 --decay-milestones 12 17 --batch-size 32 --lr 0.05
        --img-size 32 --hflip 0""",
    "fashion": """--epochs 15 --val-interval 15 --decay-milestones 9 13 --batch-size 64 --lr 0.1
        --img-size 28 --hflip 0.5""",
}
TEACHER, STUDENT = "test_resnet", "test_byobnet"
MEASURES = ("eval_top1", "eval_loss")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("data", choices=DATA)
    parser.add_argument("--folder", type=Path, help="of its images, default: data/<data>")
    parser.add_argument("--views", default="1,5,10")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--output", type=Path, default=Path("runs/reused_views"))
    args = parser.parse_args()
    output = args.output / args.data
    common = [str(args.folder or Path("data", args.data)), *f"{COMMON} {DATA[args.data]}".split()]
    ways = {**{views: ["--kd-soft-labels-views", views] for views in args.views.split(",")}, "all": []}
    found: dict[str, list[list[float]]] = {way: [] for way in ways}
    for seed in range(args.seeds):
        run = [*common, "--seed", str(seed), "--output", str(output)]
        trained(run, output, f"teacher-{seed}", "--model", TEACHER)
        labels = ["--kd-soft-labels", str(output / f"labels-{seed}"), "--kd-soft-labels-top-k", "0"]
        labels += ["--kd-soft-labels-seed", str(seed), "--model", STUDENT, "--kd-teacher", TEACHER]
        labels += ["--kd-teacher-checkpoint", str(output / f"teacher-{seed}" / "last.pth.tar")]
        forked(["soft-labels", *run, *labels])
        for way, options in ways.items():
            found[way].append(trained(run, output, f"views-{way}-{seed}", *labels, *options))
    with (args.output / f"{args.data}.csv").open("w", encoding="utf-8", newline="") as file:
        table = csv.writer(file)
        for row in rows(found):
            print(*row, sep="\t")
            table.writerow(row)


def trained(run: list[str], output: Path, name: str, *options: str) -> list[float]:
    """Train unless that is done; return the last epoch's measures."""
    summary = output / name / "summary.csv"
    if not (measured := last_row(summary)):
        forked(["train.py", *run, "--experiment", name, *options])
        measured = last_row(summary)
    return measured


def last_row(summary: Path) -> list[float]:
    """Return the measures; empty where the last epoch is not there, after which alone there are some."""
    if not summary.exists():
        return []
    with summary.open(encoding="utf-8", newline="") as file:
        measured = [row for row in csv.DictReader(file) if row["eval_top1"]]
    return [float(measured[-1][measure]) for measure in MEASURES] if measured else []


def forked(command: list[str]) -> None:
    process = multiprocessing.get_context("fork").Process(target=_exit_with, args=(command,))
    process.start()
    process.join()
    if process.exitcode:
        raise SystemExit(process.exitcode)


def _exit_with(command: list[str]) -> None:
    raise SystemExit(cli.main(command))


def rows(found: dict[str, list[list[float]]]) -> list[list[str]]:
    """Return the table's rows, its header first."""
    lines = [["views", "measure", "seeds", "mean", "standard_error", "difference_to_all", "low", "high"]]
    for number, measure in enumerate(MEASURES):
        values = {way: np.array(each)[:, number] for way, each in found.items()}
        for way, of_way in values.items():
            shown = [of_way.mean(), of_way.std(ddof=1) / np.sqrt(len(of_way))]
            if way != "all":
                apart = seed_interval(of_way - values["all"])
                shown += [apart.estimate, apart.low, apart.high]
            lines.append([way, measure, str(len(of_way)), *(f"{value:.3f}" for value in shown)])
    return lines


if __name__ == "__main__":
    main()
