"""fairseq's recipes: its own training on a few sentences, two updates and one validation."""

import random
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from lskd_study.plan.recipes import catalogue
from lskd_study.study.engine import make_plan
from lskd_study.trainers.fairseq import compose_file
from lskd_study.trainers.trainer import quiet

with quiet():
    from fairseq import options, tasks
    from fairseq_cli import preprocess
    from fairseq_cli.hydra_train import _hydra_main

    import fairseq_kd

pytestmark = pytest.mark.integration

# By the data-bin's name: entries of the real dictionaries (German, English), fairseq's own four included,
# pairs of the training set and subwords of one, source or target; of what is written to order, as the
# recipes' headers order it.
DATA = {
    "iwslt14_de_en-bin": ((8848, 6632), 160_239, 25),
    "ding_de_en-bin": ((6056, 5232), 104_745, 8),
    "ding_small_de_en-bin": ((3368, 2928), 100_681, 9),
    "number_words_de_en-bin": ((200, 200), 1_000, 25),
}
RECIPES = [recipe for recipe in catalogue() if recipe.ecosystem == "fairseq"]
FLOAT32 = 10e12  # operations in a second, a guess: small models in float32 keep no GPU busy
SENTENCES = 8


@pytest.fixture(scope="module")
def trained() -> dict[tuple[Path, ...], list[tuple[float, int]]]:
    """What `train` found, by the trainers' files, in whatever recipe came first."""
    return {}


@pytest.mark.parametrize("recipe", RECIPES, ids=[recipe.name for recipe in RECIPES])
def test_teacher_and_student(recipe, trained, costs, tmp_path):
    plan = make_plan(str(recipe.path), None)
    sizes, pairs, words = DATA[Path(plan.data).name]
    files = tuple(recipe.files[1:])
    if files not in trained:
        with quiet():
            trained[files] = [*train(files, data_bin(tmp_path, sizes), words, tmp_path)]
    (teacher, long), (student, short) = trained[files]
    runs = Counter(run.role for run in plan.runs)
    hours = runs["teacher"] * costs.hours(long, pairs, 0, teacher, sustained=FLOAT32)
    hours += runs["student"] * costs.hours(short, pairs, 0, student, teacher, sustained=FLOAT32)
    hours += runs["control"] * costs.hours(short, pairs, 0, student, sustained=FLOAT32)
    costs.check(recipe.name, hours)


def train(files: tuple[Path, ...], data: Path, words: int, folder: Path) -> Iterator[tuple[float, int]]:
    """Train a teacher, then a student of it; yield the operations of each's forward pass, and its epochs."""
    for role, path in zip(("teacher", "student"), files, strict=True):
        taught = [f"++criterion.kd_teacher='{folder}/teacher/checkpoint_last.pt'"] * (role == "student")
        cfg = compose_file(path, [*taught, *smaller(data, folder / role)])
        _hydra_main(cfg)
        yield operations(cfg, words), cfg.optimization.max_epoch


def data_bin(folder: Path, sizes: tuple[int, int]) -> Path:
    """Write a data-bin with the real number of words and a few sentences."""
    rng = random.Random(0)
    for language, size in zip(("de", "en"), sizes, strict=True):
        words = [f"{language}{number}" for number in range(size - 4)]
        (folder / f"dict.{language}.txt").write_text("".join(f"{word} 1\n" for word in words))
        for split in ("train", "valid"):
            lines = (" ".join(rng.choices(words, k=5)) + "\n" for _ in range(SENTENCES))
            (folder / f"{split}.{language}").write_text("".join(lines))
    words = ["-s", "de", "-t", "en", "--workers", "1", "--destdir", str(folder / "bin")]
    words += ["--trainpref", str(folder / "train"), "--validpref", str(folder / "valid")]
    words += ["--srcdict", str(folder / "dict.de.txt"), "--tgtdict", str(folder / "dict.en.txt")]
    preprocess.main(options.get_preprocessing_parser().parse_args(words))
    return folder / "bin"


def smaller(data: Path, save: Path) -> list[str]:
    """Return what makes two updates of eight sentences of a recipe's file."""
    return [
        f"++task.data='{data}'",
        f"++checkpoint.save_dir='{save}'",
        f"++common.user_dir='{Path(fairseq_kd.__file__).parent}'",
        "++common.cpu=true",
        "++dataset.num_workers=0",
        f"++dataset.batch_size={SENTENCES // 2}",
        "++optimization.max_update=2",
        "++lr_scheduler.warmup_updates=1",  # or the teacher has learnt nothing, and is refused
        # An untrained model talks on to the limit.
        '++task.eval_bleu_args=\'{"beam": 1, "max_len_a": 0, "max_len_b": 5}\'',
    ]


def operations(cfg, words) -> float:
    """Return the operations of one sentence's forward pass."""
    task = tasks.setup_task(cfg.task)
    tokens = torch.full((1, words), task.source_dictionary.eos())
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        task.build_model(cfg.model).eval()(tokens, torch.tensor([words]), tokens)
    return counter.get_total_flops()
