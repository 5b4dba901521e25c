"""fairseq's recipes: its own training on a few sentences, two updates and one validation."""

import io
import random
from pathlib import Path
from typing import Any

from lskd import LskdError
from lskd.base.files import read_yaml
from lskd_study.plan.recipes import Recipe
from lskd_study.recipe_check import cost
from lskd_study.recipe_check.report import CheckedRecipe, CheckedRun
from lskd_study.trainers.fairseq import compose_file
from lskd_study.trainers.size import Network
from lskd_study.trainers.trainer import quiet

STEPS = 2
# Entries of the real dictionaries (German, English), fairseq's own four included, and pairs of the training
# set; of what is written to order, as the recipes' headers order it.
_VOCABULARY = {
    "iwslt14_de_en": (8848, 6632),
    "ding_de_en": (10_000, 10_000),
    "number_words_de_en": (200, 200),
}
_PAIRS = {"iwslt14_de_en": 160_239, "ding_de_en": 200_000, "number_words_de_en": 1_000}
_WORDS = 25  # subwords of a pair, source or target, for the estimate
_SENTENCES = 8


class FairseqChecks:
    """Checks recipes one after the other."""

    def __init__(self, scratch: Path) -> None:
        """Keep a folder for miniatures and runs."""
        with quiet():
            import fairseq_kd

            assert fairseq_kd
        self.scratch = scratch

    def check(self, recipe: Recipe) -> CheckedRecipe:
        """Check the files of a teacher and its student.

        Raises:
            LskdError: one line with what is wrong.
        """
        # A study's own file comes before those of its teachers and students.
        files = recipe.files[1:] if recipe.kind == "study" else recipe.files
        teacher, *students = files
        runs = [self.check_file(teacher), *(self.check_file(student, teacher) for student in students)]
        return CheckedRecipe(recipe.name, runs)

    def check_file(self, path: Path, teacher: Path | None = None, runs: int = 1) -> CheckedRun:
        """Check one file; a student's needs its teacher's, checked before.

        Raises:
            LskdError: one line with what is wrong.
        """
        if not path.is_file():
            raise LskdError(f"{path} does not exist; a recipe of fairseq has teacher.yaml and student.yaml")
        content = read_yaml(path)
        # A study says for its files which data they read.
        name = Path(str(content.get("task", {}).get("data", path.parent.name))).name.removesuffix("-bin")
        data = self._data(name)
        save = self._save_dir(path)
        # The reasons of fairseq and hydra come in many lines: the last that says something is taken.
        with quiet() as said:
            try:
                overrides = (
                    [f"++criterion.kd_teacher={self._save_dir(teacher) / 'checkpoint_last.pt'}"]
                    if teacher
                    else []
                )
                cfg = compose_file(path, [*overrides, *_miniature(data, save, content)])
                network, rates = self._train(cfg, content)
            except LskdError as error:
                raise LskdError(_line(error)) from None
            except (Exception, SystemExit) as error:  # a framework of many kinds of errors
                raise LskdError(
                    f"{path.name}: {type(error).__name__}: {_line(error) or _last(said)}"
                ) from None
        pairs = _PAIRS.get(name, 100_000)
        updates = max(1, pairs * _WORDS // int(content["dataset"]["max_tokens"]))
        epochs = int(content["optimization"]["max_epoch"])
        corners = cost.corner_points(rates(epochs * updates))
        teacher_flops = network.flops if teacher else 0.0  # of the student's size in every recipe
        hours = cost.gpu_hours(
            epochs, pairs, 0, network.flops, teacher_flops, sustained=cost.SUSTAINED_FLOAT32
        )
        role = "student" if teacher else "teacher"
        return CheckedRun(f"{role}, {path.name}", network, corners, epochs * updates, hours, runs, "updates")

    def _save_dir(self, path: Path) -> Path:
        return self.scratch / "fairseq" / path.parent.name / path.stem

    def _data(self, name: str) -> Path:
        """Return a data-bin with the real number of words and a few sentences."""
        folder = self.scratch / "data" / f"{name}-bin"
        if folder.exists():
            return folder
        text = self.scratch / "data" / f"{name}-text"
        text.mkdir(parents=True)
        rng = random.Random(0)
        for language, size in zip(("de", "en"), _VOCABULARY.get(name, (1000, 1000)), strict=True):
            words = [f"{language}{number}" for number in range(size - 4)]
            (text / f"dict.{language}.txt").write_text(
                "".join(f"{word} 1\n" for word in words), encoding="utf-8"
            )
            for split in ("train", "valid"):
                lines = [" ".join(rng.choices(words, k=5)) for _ in range(_SENTENCES)]
                (text / f"{split}.{language}").write_text("\n".join(lines) + "\n", encoding="utf-8")
        from fairseq import options
        from fairseq_cli import preprocess

        parser = options.get_preprocessing_parser()
        words = ["-s", "de", "-t", "en", "--workers", "1", "--destdir", str(folder)]
        words += ["--trainpref", str(text / "train"), "--validpref", str(text / "valid")]
        words += ["--srcdict", str(text / "dict.de.txt"), "--tgtdict", str(text / "dict.en.txt")]
        with quiet():
            preprocess.main(parser.parse_args(words))
        return folder

    def _train(self, cfg: Any, content: dict[str, Any]) -> tuple[Network, Any]:
        import torch
        from fairseq import tasks
        from fairseq.optim.lr_scheduler import build_lr_scheduler
        from fairseq_cli.hydra_train import _hydra_main
        from torch.utils.flop_counter import FlopCounterMode

        _hydra_main(cfg)
        task = tasks.setup_task(cfg.task)
        model = task.build_model(cfg.model).eval()
        tokens = torch.full((1, _WORDS), task.source_dictionary.eos())
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            model(tokens, torch.tensor([_WORDS]), tokens.clamp(max=len(task.target_dictionary) - 1))
        parameters = sum(parameter.numel() for parameter in model.parameters())

        def rates(updates: int) -> list[float]:
            from fairseq.optim import build_optimizer

            optimizer = build_optimizer(cfg.optimizer, list(torch.nn.Linear(1, 1).parameters()))
            cfg.lr_scheduler.lr = cfg.optimization.lr
            scheduler = build_lr_scheduler(cfg.lr_scheduler, optimizer)
            return [float(scheduler.step_update(update)) for update in range(updates)]

        return Network(parameters, counter.get_total_flops()), rates


def _miniature(data: Path, save: Path, content: dict[str, Any]) -> list[str]:
    import fairseq_kd

    return [
        f"++task.data={data}",
        f"++checkpoint.save_dir={save}",
        f"++common.user_dir={Path(str(fairseq_kd.__file__)).parent}",
        "++common.cpu=true",
        "++dataset.num_workers=0",
        f"++optimization.max_update={STEPS}",
        # Two updates from eight sentences.
        f"++dataset.batch_size={_SENTENCES // STEPS}",
        # An untrained model talks on to the limit.
        '++task.eval_bleu_args=\'{"beam": 1, "max_len_a": 0, "max_len_b": 5}\'',
    ]


def _line(error: BaseException) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return " ".join(lines[0].split())[:200] if lines else ""


def _last(said: io.StringIO) -> str:
    lines = [line for line in said.getvalue().splitlines() if line.strip()]
    return lines[-1][:200] if lines else ""
