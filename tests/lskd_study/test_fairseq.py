"""A study of translation: its file, its commands, its data-bin, and fairseq's logs in nats."""

import json
import logging
import math
import shlex
import subprocess
import zipfile
from itertools import product
from pathlib import Path

import pytest
import yaml

from lskd import DivergedError, LskdError
from lskd_study.data.text import parallel
from lskd_study.plan.plan import Plan
from lskd_study.plan.schema import load_study
from lskd_study.stores.decide import with_stores
from lskd_study.study import checks, engine
from lskd_study.trainers import fairseq, trainer_of

pytestmark = pytest.mark.unit

ROOT = Path(__file__).parents[2]
RECIPES = ("number_words_de_en", "ding_de_en", "iwslt14_de_en")
FAIRSEQ = trainer_of("fairseq", "student")
STUDY, TEACHER, STUDENT = (
    yaml.safe_load((ROOT / "recipes" / RECIPES[0] / f"{name}.yaml").read_text())
    for name in ("study", "teacher", "student")
)


@pytest.fixture
def make(tmp_path, monkeypatch):
    """Make a plan from a study with changes, in an empty folder."""
    monkeypatch.chdir(tmp_path)

    def plan(teacher=TEACHER, student=STUDENT, **changes) -> Plan:
        content = {k: v for k, v in (STUDY | {"title": "T"} | changes).items() if v is not None}
        for name, file in (("teacher", teacher), ("student", student), ("study", content)):
            (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(file, sort_keys=False))
        return engine.make_plan("study.yaml", None)

    return plan


def options_of(words: list[str]) -> dict[str, str]:
    return dict(word.split("=", 1) for word in words[5:])


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_are_studies(monkeypatch, name):
    monkeypatch.chdir(ROOT)
    plan = engine.make_plan(f"recipes/{name}/study.yaml", None)
    assert (plan.ecosystem, plan.num_classes, plan.data) == ("fairseq", 0, f"data/{name}-bin")
    assert {run.hard_weight for run in plan.runs if run.role == "student"} == {0.1}
    words = FAIRSEQ.command(plan, plan.runs[0])
    assert words[:3] == ["fairseq-hydra-train", "--config-dir", f"recipes/{name}"]
    assert options_of(words)["common.user_dir"] == "plugins/fairseq_kd"


WORDS = {"prepare": "number-words"}
UNKNOWN = "unknown option of `lskd data number-words`; did you mean 'train'"


@pytest.mark.parametrize(
    ("ecosystem", "data", "message"),
    [
        ("fairseq", {"num_classes": 3}, ":5: data.num_classes: a fairseq study has no classes"),
        ("timm", {}, ":3: 'data.num_classes' is missing; add it"),
        ("mmcls", {}, ":3: 'data.num_classes' is missing; add it"),
        ("fairseq", {"prepare": "digits"}, ":5: data.prepare: it makes no data for fairseq"),
        ("timm", {"num_classes": 3, "prepare": "ding"}, "it makes no data for timm, which takes cub200, dig"),
        ("fairseq", {"options": {"train": 3}}, ":5: data.options: they belong to data.prepare"),
        (
            "fairseq",
            {"prepare": "ding", "options": {"output": "x"}},
            ":7: data.options.output: the study set",
        ),
        ("fairseq", WORDS | {"options": {"trian": 3}}, f":7: data.options.trian: {UNKNOWN}"),
        ("fairseq", WORDS | {"options": {"train": "many"}}, "number-words: Invalid value for '--train'"),
    ],
)
def test_data_are_those_of_the_ecosystem(make, ecosystem, data, message):
    with pytest.raises(LskdError, match=message) as caught:
        make(ecosystem=ecosystem, data={"path": "d"} | data)
    assert "\n" not in str(caught.value)


def test_labels_keep_their_share_unless_it_is_said(make, tmp_path):
    make(hard_weights=None)
    assert load_study(tmp_path / "study.yaml").hard_weights == [0.1]
    make(hard_weights=[0])
    assert load_study(tmp_path / "study.yaml").hard_weights == [0]


def test_a_command_decides_what_the_study_decides(make):
    plan = make(temperatures=[2], hard_weights=[0.25])
    teacher, student = (
        next(run for run in plan.runs if run.role == role and run.smoothing and run.seed == 3)
        for role in ("teacher", "student")
    )
    words = FAIRSEQ.command(plan, teacher)
    assert words[:5] == ["fairseq-hydra-train", "--config-dir", ".", "--config-name", "teacher"]
    options = options_of(words)
    assert options["++criterion.label_smoothing"] == "0.1"
    assert (options["common.seed"], options["task.data"]) == ("3", "data/number_words_de_en-bin")
    folder = "runs/number_words_de_en/teachers/teacher-transformer-smoothing0.1-seed3"
    assert options["checkpoint.save_dir"] == options["hydra.run.dir"] == folder
    plugin = fairseq._override("common.user_dir", ROOT / "plugins" / "fairseq_kd")  # not below this folder
    assert plugin in words
    taught = options_of(FAIRSEQ.command(plan, student))
    assert taught["++criterion.kd_teacher"] == f"{folder}/checkpoint_best.pt"
    assert (taught["++criterion.kd_weight"], taught["++criterion.kd_temperature"]) == ("0.75", "2")
    assert "++criterion.label_smoothing" not in taught
    again = options_of(FAIRSEQ.command(plan, student, "rerun"))
    assert again["checkpoint.save_dir"] == f"rerun/{student.id}"


def test_smoothing_of_the_other_convention_is_the_plugins(make):
    plan = make(smoothing={"values": [0, 0.1], "convention": "uniform"})
    words = FAIRSEQ.command(plan, next(run for run in plan.runs if run.smoothing))
    own = {"_name": "ls_kd", "kd_weight": "0", "smoothing_convention": "uniform", "label_smoothing": "0.1"}
    expected = {f"++criterion.{name}={value}" for name, value in own.items()}
    assert {word for word in words if word.startswith("++")} == expected


@pytest.mark.parametrize("output", ["runs/a b", "runs/it's, [odd]", "runs/a=b{c}", "runs/ä"])
def test_any_folder_survives_shell_and_hydra(make, output):
    from hydra.core.override_parser.overrides_parser import OverridesParser

    plan = make(output=output)
    words = shlex.split(shlex.join(FAIRSEQ.command(plan, plan.runs[0])))
    parsed = {item.key_or_group: item.value() for item in OverridesParser.create().parse_overrides(words[5:])}
    assert parsed["checkpoint.save_dir"] == f"{output}/{plan.runs[0].folder}"


def changed(content, section, **settings):
    values = {k: v for k, v in (content[section] | settings).items() if v is not None}
    return content | {section: values}


MAX_EPOCHS = r"unknown setting optimization.max_epochs; did you mean 'max_epoch'\?"
BEST = "set checkpoint.best_checkpoint_metric: bleu"
IWSLT = "the study file says transformer; make them equal"


@pytest.mark.parametrize(
    ("teacher", "message"),
    [
        (changed(TEACHER, "optimization", max_epochs=3), MAX_EPOCHS),
        (changed(TEACHER, "optimization", max_epoch="many"), "optimization.max_epoch: Value 'many'"),
        (changed(TEACHER, "model", encoder={"layer": 2}), "model.encoder.layer; did you mean 'layers'"),
        (changed(TEACHER, "model", _name="transformr"), "is 'transformr'; did you mean 'transformer'"),
        (changed(TEACHER, "model", _name="transformer_iwslt_de_en"), IWSLT),
        (changed(TEACHER, "optimizer", _name=["adam"]), r"optimizer._name is \['adam'\]"),
        (changed(TEACHER, "optimizer", _name="adams"), "optimizer._name is 'adams'; did you mean 'adam'"),
        (TEACHER | {"optimiser": {}}, "unknown section 'optimiser'; did you mean 'optimizer'"),
        (changed(TEACHER, "task", _name="translation"), "set task._name: translation_ls_kd"),
        (changed(TEACHER, "task", eval_bleu=False), "set task.eval_bleu: true"),
        (changed(TEACHER, "checkpoint", best_checkpoint_metric=None), BEST),
        (changed(TEACHER, "checkpoint", no_save=True), "checkpoint.no_save is of no use in a study"),
        (changed(TEACHER, "dataset", valid_subset="test"), "must be valid, never test"),
        (STUDENT, "criterion._name is ls_kd; a teacher's is label_smoothed_cross_entropy"),
        (TEACHER | {"defaults": ["_self_"]}, "it has defaults"),
        (changed(TEACHER, "model", _name="fconv", encoder=None, decoder=None), "its architecture is 'fconv'"),
        (changed(TEACHER, "model", encoder_xformers_att_config="f()"), "att_config would be run as code"),
        (changed(TEACHER, "model", adaptive_softmax_cutoff=[10]), "leaves no logits to distil"),
    ],
)
def test_files_are_checked_before_any_run(make, teacher, message):
    with pytest.raises(LskdError, match=message) as caught:
        make(teacher=teacher)
    assert str(caught.value).startswith("teacher.yaml: ")
    assert "\n" not in str(caught.value)


def test_flat_names_of_a_model_are_known_too(make):
    make(teacher=changed(TEACHER, "model", encoder=None, encoder_embed_dim=64))


def test_checking_leaves_logging_as_it_was(make):
    root = logging.getLogger()
    before = root.level, list(root.handlers)
    make()
    assert (root.level, root.handlers) == before


def log(folder: Path, *lines: str) -> None:
    (folder / fairseq.LOG).write_text("".join(f"{line}\n" for line in lines))


def line(kind: str, **values: object) -> str:
    return f"[2026-01-01 00:00:00,000][{kind}][INFO] - " + json.dumps(
        {key: value if key == "epoch" else str(value) for key, value in values.items()}
    )


def test_curves_are_in_nats(tmp_path):
    log(
        tmp_path,
        "[2026-01-01 00:00:00,000][fairseq_cli.train][INFO] - {'_name': None}",
        line("train_inner", epoch=1, loss=9),
        line("valid", epoch=1, valid_loss=4.5, valid_nll_loss=2, valid_ppl=4, valid_bleu=12.5),
        line("train", epoch=1, train_loss=3, train_nll_loss=2.5, train_kd_ce=2, train_kd_kl=0.5,
             train_kd_teacher_entropy=1.5, train_kd_hard_ce=4, train_kd_agreement=0.75, train_kd_weight=0.9),
    )  # fmt: skip
    (row,) = FAIRSEQ.read_curves(tmp_path, "student")
    assert tuple(row) == FAIRSEQ.curve_columns
    numbers = {name: float(value) for name, value in row.items()}
    expected = {
        "epoch": 0,
        "train_ce": 1.3862943611,  # 2 bits
        "train_kl": 0.3465735903,
        "train_teacher_entropy": 1.0397207708,
        "train_hard_ce": 2.7725887222,
        "train_agreement": 0.75,
        "val_loss": 1.3862943611,  # without smoothing, whatever valid_loss is
        "val_bleu": 12.5,
        "val_ppl": 4,
    }
    assert numbers == pytest.approx(expected, rel=1e-7)
    assert numbers["val_ppl"] == pytest.approx(math.exp(numbers["val_loss"]), rel=1e-7)


def test_a_teacher_that_was_not_asked_is_not_measured(tmp_path):
    """As the threshold schedule leaves it at weight 0."""
    silent = ("ce", "kl", "teacher_entropy", "agreement")
    terms = {f"train_kd_{name}": "nan" for name in silent}
    log(tmp_path, line("train", epoch=1, train_loss=2, train_kd_hard_ce=2, train_kd_weight=0, **terms))
    (row,) = FAIRSEQ.read_curves(tmp_path, "student")
    assert [row[f"train_{name}"] for name in silent] == [""] * 4
    assert float(row["train_hard_ce"]) == pytest.approx(2 * math.log(2))


def test_a_teachers_loss_is_its_hard_cross_entropy(tmp_path):
    log(tmp_path, line("train", epoch=1, train_loss=1), line("train", epoch=2, train_loss="nan"))
    first, second = FAIRSEQ.read_curves(tmp_path, "teacher")
    assert (first["train_ce"], first["val_bleu"], first["val_ppl"]) == ("", "", "")
    assert float(first["train_hard_ce"]) == pytest.approx(0.69314718)
    assert math.isnan(float(second["train_hard_ce"]))


def test_an_ended_run_repeats_an_epoch_and_it_counts_once(tmp_path):
    half = line("train", epoch=3, train_loss=7)[:60]
    log(
        tmp_path,
        *(line("train", epoch=epoch, train_loss=epoch) for epoch in (1, 2)),
        line("valid", epoch=2, valid_nll_loss=1, valid_bleu=1),
        half + line("valid", epoch=2, valid_nll_loss=2, valid_bleu=3),  # killed within a line, then resumed
        line("train", epoch=2, train_loss=4),
    )
    rows = FAIRSEQ.read_curves(tmp_path, "teacher")
    assert [row["epoch"] for row in rows] == ["0", "1"]
    assert rows[1]["val_bleu"] == "3"
    assert float(rows[1]["train_hard_ce"]) == pytest.approx(4 * math.log(2))


@pytest.mark.parametrize("values", [{"train_loss": "3,1"}, {"valid_bleu": [1]}, {"train_kd_agreement": "x"}])
def test_a_log_with_what_is_no_number_is_one_line(tmp_path, values):
    log(tmp_path, line("train", epoch=1, **values))
    with pytest.raises(LskdError, match=r"hydra_train\.log has a value that is no number"):
        FAIRSEQ.read_curves(tmp_path, "teacher")


def test_a_run_without_a_log_is_one_line(tmp_path):
    with pytest.raises(LskdError, match=r"left no .*hydra_train\.log"):
        FAIRSEQ.read_curves(tmp_path, "teacher")
    for text in ("nothing", line("train", epoch=-1), line("train", epoch=0)):
        log(tmp_path, text)
        with pytest.raises(LskdError, match="has no epochs"):
            FAIRSEQ.read_curves(tmp_path, "teacher")


def test_a_run_goes_on_from_a_whole_checkpoint_only(tmp_path):
    best, last = tmp_path / "checkpoint_best.pt", tmp_path / "checkpoint_last.pt"
    assert FAIRSEQ.resume(tmp_path) is None
    with zipfile.ZipFile(best, "w") as file:
        file.writestr("archive/data.pkl", "x" * 1000)
    last.write_bytes(best.read_bytes()[:500])  # ended while fairseq copied the best
    assert FAIRSEQ.resume(tmp_path) == [fairseq._override("checkpoint.restore_file", best)]
    last.write_bytes(best.read_bytes())
    assert FAIRSEQ.resume(tmp_path) == []
    best.unlink()
    last.write_bytes(last.read_bytes()[:500])
    assert FAIRSEQ.resume(tmp_path) is None


def test_data_are_made_in_one_command(make):
    plan = make()
    words = ["--train", "1000", "--valid", "200", "--test", "500"]
    folders = ["--output", "data/number_words_de_en", "--data-bin", "data/number_words_de_en-bin"]
    assert plan.prepare_arguments == ["data", "number-words", *words, *folders]
    ding = {"path": "d", "prepare": "ding", "options": {"sentences-only": True}}
    words = ["data", "ding", "--sentences-only", "--output", "d-text", "--data-bin", "d"]
    assert make(data=ding).prepare_arguments == words
    assert make(data={"path": "d"}).prepare_arguments == []


SPLITS = product(("train", "valid", "test"), ("de", "en"), ("bin", "idx"))
FILES = ["dict.de.txt", "dict.en.txt", *(f"{split}.de-en.{side}.{kind}" for split, side, kind in SPLITS)]


def write_files(folder: Path, *left_out: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name in FILES:
        if name not in left_out:
            (folder / name).write_text(name)


@pytest.mark.parametrize(
    ("left_out", "message"),
    [
        (FILES, "no data-bin, it has no two dictionaries"),
        (["dict.en.txt"], "no data-bin, it has no two dictionaries"),
        (["test.de-en.en.bin"], "d has no test set in two languages; make it"),
        (["train.de-en.de.idx"], "d has no train set in two languages; make it"),
    ],
)
def test_a_data_bin_that_lacks_something(tmp_path, left_out, message):
    write_files(tmp_path / "d", *left_out)
    with pytest.raises(LskdError, match=message):
        checks.check_data_bin(tmp_path / "d", "d", {}, "make it")
    with pytest.raises(LskdError, match="data-bin none does not exist; make it"):
        checks.check_data_bin(tmp_path / "none", "none", {}, "make it")


@pytest.fixture
def preprocess(monkeypatch):
    """fairseq-preprocess that only writes files, or fails half-way."""
    state = {"fails": False, "calls": 0}

    def run(words, **_):
        state["calls"] += 1
        folder = Path(words[words.index("--destdir") + 1])
        write_files(folder, *(FILES[3:] if state["fails"] else ()))
        (folder / "preprocess.log").write_text(str(folder))
        said = "Traceback\nValueError: no words\n"
        return subprocess.CompletedProcess(words, int(state["fails"]), "", said)

    monkeypatch.setattr(parallel.subprocess, "run", run)
    return state


def test_a_data_bin_appears_whole_or_not_at_all(tmp_path, preprocess):
    output = tmp_path / "data" / "d-bin"
    text = {"name": "n", "pairs": {"train": 1}, "listing_sha256": "abc"}
    preprocess["fails"] = True
    with pytest.raises(LskdError, match=r"fairseq-preprocess failed on .*: ValueError: no words"):
        parallel.write_data_bin(output, tmp_path / "text", text, {"train": 1})
    assert list(output.parent.iterdir()) == []
    preprocess["fails"] = False
    assert parallel.write_data_bin(output, tmp_path / "text", text, {"train": 1}).written
    assert not parallel.write_data_bin(output, tmp_path / "text", text, {"train": 1}).written
    assert preprocess["calls"] == 2
    manifest = parallel.read_manifest(output)
    assert manifest["listing_sha256"] == parallel.text_checksum(output)
    assert not (output / "preprocess.log").exists()
    checks.check_data_bin(output, "d-bin", {"train": 1, "seed": 5})
    with pytest.raises(LskdError, match="d-bin was made with train 1, the study asks for 2; choose another"):
        checks.check_data_bin(output, "d-bin", {"train": 2})
    with pytest.raises(LskdError, match="exists and is not this data-bin"):
        parallel.write_data_bin(output, tmp_path / "text", text | {"listing_sha256": "other"}, {})


def test_a_run_that_diverged_is_told_from_a_mistake(monkeypatch):
    def diverge():
        raise DivergedError("epoch 3: the validation loss is nan")

    monkeypatch.setattr("fairseq_cli.hydra_train.cli_main", diverge)
    with pytest.raises(DivergedError, match=r"^epoch 3: the validation loss is nan$"):
        FAIRSEQ.train([])


def test_runs_are_built_before_any_trains(make):
    checks.try_out(make())
    wrong = STUDENT | {"optimizer": STUDENT["optimizer"] | {"adam_betas": "(0.9"}}
    with pytest.raises(LskdError, match=r"^student.yaml, student transformer: .*never closed"):
        checks.try_out(make(student=wrong))


def test_a_student_is_built_before_its_store_is_written(make, monkeypatch):
    asked = []
    monkeypatch.setattr(fairseq, "_build", lambda cfg, _: asked.append(cfg.task.get("kd_soft_labels")))
    plan = with_stores(make(soft_labels={"top_k": 8}, controls=[]))
    student = plan.runs[-1]
    assert f"++task.kd_soft_labels={plan.labels(plan.store_of(student))}" in FAIRSEQ.command(plan, student)
    checks.try_out(plan)
    assert asked == [None, None]  # a teacher and a student
