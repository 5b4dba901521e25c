"""What a study and its runs leave."""

import atexit
import contextlib
import csv
import dataclasses
import functools
import importlib.util
import io
import itertools
import json
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fuzz import attacks
from fuzz.harness import Read, one_file, same
from lskd import DivergedError, LskdError


@functools.cache
def _conftest() -> Any:
    found = importlib.util.spec_from_file_location(
        "simulated_studies", Path(__file__).parents[1] / "lskd_study/conftest.py"
    )
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    return module


@functools.cache
def _finished() -> tuple[Path, Any]:
    from lskd_study.pages.study import write_report

    folder = Path(tempfile.mkdtemp())
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    plan = _conftest().study_maker(folder)(seeds=[0, 1], students=[("small", "student.yaml")], per_class=5)
    with contextlib.redirect_stderr(io.StringIO()):
        write_report(plan)
    return folder, plan


def _study(folder: Path) -> Any:
    """Copy a finished study, which is made once."""
    made, plan = _finished()
    shutil.copytree(made, folder, dirs_exist_ok=True)
    return dataclasses.replace(plan, cwd=str(folder))


def plan_file(folder: Path) -> tuple[Sequence[bytes], Read]:
    from lskd_study.plan.plan import Plan

    def read(path: Path) -> None:
        found = Plan.read(path)
        again = dataclasses.replace(found, cwd=str(folder), output="again")
        again.write()
        same(Plan.read(folder / "again" / "plan.json"), again)

    return [(_study(folder).root / "plan.json").read_bytes()], one_file("plan.json", read)(folder)


def job_file(folder: Path) -> tuple[Sequence[bytes], Read]:
    from lskd_study.plan import records

    plan = _study(folder)
    kinds = (records.Job, records.MadeRun, records.MadeStore, records.Begun)
    store = {"teacher": {"checkpoint_sha256": "a"}, "soft_labels": {"bytes": 3}, "wall_time_s": 1.5}
    begun = {"settings": {"a": 1}, "teacher": {"checkpoint_sha256": "a"}, "resumed": 2}

    def read(path: Path) -> None:
        refused = []
        for kind in kinds:
            try:
                found = records.read_record(path, kind)
                same(found, json.loads(path.read_bytes()))
            except LskdError as error:
                refused.append(error)
        if len(refused) == len(kinds):
            raise refused[0]

    job = (plan.folder(plan.runs[-1]) / "job.json").read_bytes()
    return [job, json.dumps(store).encode(), json.dumps(begun).encode()], one_file("job.json", read)(folder)


def verdicts(folder: Path) -> tuple[Sequence[bytes], Read]:
    from lskd_study.pages.verdicts import StudyRecord, read_record

    plan = _study(folder)

    def read(path: Path) -> None:
        found = read_record(path.parent)
        same(found, StudyRecord.model_validate_json(found.text()))
        same(found, StudyRecord.model_validate(json.loads(path.read_bytes())))

    return [(plan.root / "verdicts.json").read_bytes()], one_file("verdicts.json", read)(folder)


def index_page(folder: Path) -> tuple[Sequence[bytes], Read]:
    """The page over studies is made of their verdicts: no text of theirs is markup in it."""
    from html.parser import HTMLParser

    from lskd_study.pages.index import write_index

    plan = _study(folder)
    (folder / "index.html").touch()

    class Tags(HTMLParser):
        def __init__(self) -> None:
            super().__init__()
            self.seen: set[str] = set()

        def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            self.seen.add(tag)
            self.seen.update(f"{tag} {name}" for name, _ in attrs)

    def tags(text: str) -> set[str]:
        parser = Tags()
        parser.feed(text)
        return parser.seen

    sound = (plan.root / "verdicts.json").read_bytes()
    own: set[str] = set()

    def read(path: Path) -> None:
        write_index([path.parent], folder / "page.html", "T")
        html = (folder / "page.html").read_text()
        strange = {one for one in tags(html) if one.split()[0] in ("img", "b") or "mouseover" in one}
        assert not strange, f"markup of a study's text: {strange}"
        assert html.count("<script") == 1

    del own
    return [sound], one_file("verdicts.json", read)(folder)


def run_folder(folder: Path) -> tuple[Sequence[bytes], Read]:
    """Logits, curves or the note of a run."""
    from lskd_study.results.read import _read

    plan = _study(folder)
    run = plan.runs[-1]
    names = ("val_logits.safetensors", "curves.csv", "job.json")
    clean = {name: (plan.folder(run) / name).read_bytes() for name in names}

    def read(data: bytes) -> None:
        name = names[data[0] % 3] if data else names[0]
        path = plan.folder(run) / name
        try:
            path.write_bytes(data[1:])
            found = _read(plan, run)
            if isinstance(found, DivergedError):
                raise found
            assert np.isfinite(found.target_probability).all()
            assert 0 <= found.top1 <= 100
            assert found.labels.min() >= 0
            assert found.labels.max() < plan.num_classes
            assert len(set(found.keys)) == len(found.keys) == len(found.labels)
        finally:
            path.write_bytes(clean[name])

    return [bytes([number]) + clean[name] for number, name in enumerate(names)], read


def _cells(path: Path) -> list[list[str]]:
    """Read a table as Python's own reader of cells does, which fits no names to them."""
    with path.open(encoding="utf-8-sig", newline="") as file:
        return [row for row in csv.reader(file) if row]


def curves(folder: Path) -> tuple[Sequence[bytes], Read]:
    from lskd_study.results.results import read_curves

    def read(path: Path) -> None:
        try:
            found = read_curves(path)
        except (ValueError, OSError) as error:  # said by `results.read`, with the run
            raise LskdError(str(error)) from error
        header, *rows = _cells(path)
        for name, column in zip(header, zip(*rows, strict=True), strict=True):
            assert not name or np.array_equal(
                found[name], [float(cell or "nan") for cell in column], equal_nan=True
            )

    plan = _study(folder)
    return [(plan.folder(run) / "curves.csv").read_bytes() for run in plan.runs[:3]], one_file(
        "curves.csv", read
    )(folder)


def epochs(ecosystem: str, name: str, sound: bytes) -> Callable[[Path], tuple[Sequence[bytes], Read]]:
    def prepare(folder: Path) -> tuple[Sequence[bytes], Read]:
        from lskd_study.trainers import trainer_of

        trainer = trainer_of(ecosystem, "student")

        def read(path: Path) -> None:
            for role in ("teacher", "student"):
                rows = trainer.read_curves(path.parent, role)
                assert rows
                assert all(row.keys() == set(trainer.curve_columns) for row in rows)
                assert all(int(row["epoch"]) >= -1 for row in rows)
                if path.suffix == ".csv":
                    cells = {"", *itertools.chain(*_cells(path))}
                    assert all({*row.values()} - {row["epoch"]} <= cells for row in rows)

        return [sound], one_file(name, read)(folder)

    return prepare


def resumed_summary(folder: Path) -> tuple[Sequence[bytes], Read]:
    """The table that timm's trainer goes on from."""
    from timm_ls_kd.trainer.run_folder import RunFolder

    run = RunFolder.__new__(RunFolder)
    run.folder, run.summary, run._column = folder, folder / "summary.csv", "eval_top1"

    def read(path: Path) -> None:
        with contextlib.redirect_stdout(io.StringIO()):
            assert all(0 <= epoch < 2 for epoch in run._trim(2, False, ""))
        for aside in folder.glob("*.aside-*"):
            aside.unlink()

    sound = b"epoch,train_loss,eval_top1\r\n0,1.0,2.0\r\n1,0.9,2.5\r\n2,0.8,2.4\r\n"
    return [sound], one_file("summary.csv", read)(folder)


def _fairseq_log() -> Iterator[str]:
    for epoch in (1, 2):
        valid = {"valid_loss": "3", "valid_nll_loss": "2.5", "valid_bleu": "20.1"}
        for split, values in {"train": {"train_loss": "3.1"}, "valid": valid}.items():
            line = json.dumps({"epoch": epoch} | values)
            yield f"[2026-01-01 00:00:0{epoch}][{split}][INFO] - {line}\nsomething else\n"


FAIRSEQ_LOG = "".join(_fairseq_log()).encode()


def translations(folder: Path) -> tuple[Sequence[bytes], Read]:
    from lskd_study.results.translation import _read_sentences

    names = ("source", "reference", "hypothesis", "reference_tokens", "hypothesis_tokens")
    said = {"confidence": [0.25, 1.0], "correct": [0, 1]}
    lines = [json.dumps({"id": i} | {name: f"a\u2028 {name} {i}" for name in names} | said) for i in range(3)]

    def read(path: Path) -> None:
        try:
            found = _read_sentences(path)
        except (ValueError, OSError) as error:  # said by `results.read`, with the run
            raise LskdError(str(error)) from error
        assert len({sentence.id for sentence in found}) == len(found)
        content = [json.loads(line) for line in path.read_text("utf-8").removesuffix("\n").split("\n")]
        for sentence, line in zip(found, sorted(content, key=lambda line: line["id"]), strict=True):
            own = {"confidence": [], "correct": []} | line
            same(dataclasses.asdict(sentence), {name: own[name] for name in sentence.__annotations__})

    return ["".join(f"{line}\n" for line in lines).encode()], one_file("translations.jsonl", read)(folder)


def results_table(folder: Path) -> tuple[Sequence[bytes], Read]:
    """A CSV table of anybody's results, as `lskd figure` takes it; in ours no name is a formula."""
    from lskd_study.base.text import csv_text
    from lskd_study.drawing.tables import read_table, table_flag, table_number

    def read(path: Path) -> None:
        rows = read_table(path, ["name", "accuracy"])
        same([[*rows[0]], *([*row.values()] for row in rows)], _cells(path))
        for row in rows:
            table_number(row, "accuracy", path)
            table_flag(row, "smoothed", path) if "smoothed" in row else None
        text = csv_text(list(rows[0]), [list(row.values()) for row in rows])
        for cells in csv.reader(io.StringIO(text, newline="")):
            for cell in cells:
                with contextlib.suppress(ValueError):
                    float(cell)
                    continue
                assert not cell.startswith(("=", "+", "-", "@", "\t", "\r", "\n")), f"a formula: {cell!r}"

    names = "".join(f'"{name.replace(chr(34), chr(34) * 2)}",71.5,true\n' for name in attacks.NAMES)
    return [
        b"name,accuracy,smoothed\na,70.1,0.1\nb,,no\n",
        f"name,accuracy,smoothed\n{names}".encode(),
    ], one_file("table.csv", read)(folder)
