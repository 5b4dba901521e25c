"""A study from Python: load or build one, run it as ``lskd study`` does, get what it found."""

import io
import json
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Self

import pandas as pd
import yaml
from matplotlib.figure import Figure

from lskd import LskdError
from lskd.base.files import write_text
from lskd_study.claims import Finding, judge
from lskd_study.claims.outlook import before
from lskd_study.drawing.curves import curves_csv
from lskd_study.pages.paper_figures import plans_of, study_figures
from lskd_study.pages.study import study_page
from lskd_study.pages.tables import runs_csv
from lskd_study.pages.verdicts import StudyRecord, read_record
from lskd_study.plan import schema
from lskd_study.plan.json_schema import modeline
from lskd_study.plan.plan import PLAN, Plan
from lskd_study.results.read import read_results
from lskd_study.results.results import Results
from lskd_study.stores.decide import with_stores
from lskd_study.study.engine import describe, find_study, make_plan, plan_of, run_plans, study_of
from lskd_study.study.planning import outlooks_of

_FILE = "study.yaml"
_MARK = "# Written by lskd_study.Study."


class Study:
    """A study as an object: what ``lskd study`` does, by the same code, and what it found.

    A study of a file runs from that file, and one of an output folder goes on. One that is built or changed
    here is written when it runs, as ``study.yaml`` in its output folder, and ``lskd study`` goes on with it.

    Args:
        source: a study file, the name of a recipe's, the output folder of a study, or what a study file says
            as a mapping.
        **keys: of a study file (``lskd study --schema``), in place of the source's; alone they are a study.
            Trainers' files in them, and in a mapping, are relative to the working directory.

    Raises:
        LskdError: one line that says what is wrong: with the key, and in a file with the line.

    Attributes:
        output: the folder of results.
    """

    def __init__(self, source: str | os.PathLike[str] | Mapping[str, Any] | None = None, /, **keys: Any):
        self._content: schema.Study | None = None  # of a study that no file says as it is
        self._name, self._output = "", None
        if source is None or isinstance(source, Mapping):
            self._build({**(source or {}), **keys})
        elif Path(source).is_dir():
            if keys:
                what = next(iter(keys))
                raise LskdError(f"{source} is a folder of results; to change {what} name a study file")
            if not Path(source, PLAN).is_file():
                study_of(os.fspath(source), None)  # says what is wrong with it
            self._name, self.output = os.fspath(source), Path(source)
        else:
            self._name = os.fspath(source)
            study, path = find_study(self._name)
            if keys.keys() <= {"output"}:
                self._output = os.fspath(keys["output"]) if keys.get("output") is not None else None
                self.output = Path(self._output or study.output)
            else:
                self._build({**_plain(study, path.parent), **keys})

    def _build(self, content: dict[str, Any]) -> None:
        """Take what a study file in this folder would say."""
        study = schema.validated(json.loads(json.dumps(content, default=_said)), schema.Study, "study")
        self._content = schema.Study.model_validate(_plain(study, Path()))
        self.output = Path(study.output)
        self._name = str(self.output / _FILE)

    def __repr__(self) -> str:
        """Return it as a call."""
        return f"Study({self._name!r}, output={str(self.output)!r})"

    def plan(self) -> Plan:
        """Return the matrix spelled out, every run with its folder and settings; nothing is written.

        Raises:
            LskdError: for anything in the study, or the files that it names, that is not as it should be.
        """
        return self._make()

    def _make(self, max_seeds: int | None = None, number: int | None = None) -> Plan:
        if self._content is not None:
            return plan_of(self._content, Path(self._name), self._name, None, max_seeds, number)
        folder = Path(self._name).is_dir()
        file, output = study_of(self._name, None) if folder else (self._name, self._output)
        return make_plan(file, output, max_seeds, number)

    def describe(self) -> str:
        """Return what there is to do and what it can tell, in the words of ``lskd study --dry-run``."""
        plan = with_stores(self.plan())
        return describe(plan, before(plan, outlooks_of(plan)))

    def run(
        self,
        *,
        cores: int | None = None,
        max_seeds: int | None = None,
        variance_from: str | None = None,
        options: Sequence[str] = (),
    ) -> Self:
        """Run the study, or go on with it, print what the command prints, write its page, and return it.

        Args:
            cores: runs at a time; None: 1 on this machine, and on a cluster no limit.
            max_seeds: seeds are added until it is decided, up to so many; None: the study's own.
            variance_from: results of a study whose differences vary as much as this one's will.
            options: for Snakemake.

        Raises:
            LskdError: for what the user can fix, before anything is trained; when runs failed or are missing;
                and when it was stopped.
        """
        if threading.current_thread() is not threading.main_thread():
            raise LskdError(
                "a study runs in the main thread, where Ctrl-C ends all that it started; call run there"
            )
        write = self._own_file() if self._content is not None else None
        make = partial(self._make, max_seeds)
        try:
            status = run_plans(make, cores, False, options, variance_from, write)
        finally:
            vars(self).pop("_results", None)
        if status:
            plan = Plan.read(self.output / PLAN)
            lost = [run.id for run in plan.runs if not plan.done(run) or plan.failed(run)]
            count = f"{len(lost)} of {len(plan.runs)} runs in {self.output}"
            raise LskdError(f"{count} failed or are missing, e.g. {lost[0]}; its train.log says why")
        return self

    def _own_file(self) -> Callable[[], None]:
        """Return what writes the study's file, over one that was written here and over no other."""
        path = Path(self._name)
        if path.is_file() and not path.read_bytes().startswith(_MARK.encode()):
            raise LskdError(f"{path} is a study file of your own; name it, or choose another output")
        if not path.is_file() and (self.output / PLAN).is_file():
            raise LskdError(f"{self.output} contains the results of another study; choose another output")
        assert self._content is not None
        content = self._content.model_dump(exclude_unset=True)
        text = yaml.safe_dump(content, sort_keys=False, allow_unicode=True)
        return partial(write_text, path, f"{_MARK}\n{modeline()}\n{text}")

    @cached_property
    def _results(self) -> Results[Any]:
        plans = plans_of([self.output])
        results = read_results(plans[self.output]) if plans else None
        if results is None or not results.finished:
            raise LskdError(f"no run in {self.output} has finished; run() trains them")
        return results

    def results(self) -> pd.DataFrame:
        """Return one row for each run that ended: what it is, what it measured (percent, nats, seconds).

        ``teacher`` is the run that taught a student. What was not measured is NaN, and ``failed`` says why.
        Read when it is first asked for, as is all that follows, and again after ``run``.

        Raises:
            LskdError: no run has finished, or a run's folder is damaged.
        """
        frame = _frame(runs_csv(self._results))
        plan = self._results.plan
        frame.insert(3, "teacher", [plan.run(run).teacher for run in frame["run"]])
        return frame

    def curves(self) -> pd.DataFrame:
        """Return one row for each epoch (from 0) of each finished run: losses in nats, accuracies in percent.

        Raises:
            LskdError: as ``results``.
        """
        return _frame(curves_csv(self._results))

    def findings(self) -> list[Finding]:
        """Return the claims that the study tests, with estimates and verdicts; the headline is the first.

        Raises:
            LskdError: as ``results``.
        """
        return judge(self._results)

    def verdicts(self) -> StudyRecord:
        """Return what the page says, as ``verdicts.json`` has it.

        Raises:
            LskdError: the study has no page yet, or one of another version.
        """
        return read_record(self.output)

    def figures(self) -> dict[str, Figure]:
        """Return the page's figures by the names of their files.

        Raises:
            LskdError: as ``results``.
        """
        results = self._results
        if results.plan.teachers_alone:
            return {one.stem: one.drawing.figure for one in study_figures(results)}
        drawings = study_page(results, self.findings()).drawings
        return {name: drawing.figure for name, drawing in drawings.items()}


def _plain(study: schema.Study, folder: Path) -> dict[str, Any]:
    """Return what a study file says in any folder, when its own is this one."""
    content: dict[str, Any] = json.loads(study.model_dump_json(exclude_unset=True))
    for network in [*content["teachers"], *content.get("students", [])]:
        network["config"] = str(Path(folder, network["config"]).resolve())
    return content


def _said(value: Any) -> Any:
    """Return how a study file would say a value of Python that is none of YAML's."""
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, range):
        return list(value)
    if hasattr(value, "tolist"):  # of NumPy
        return value.tolist()
    raise LskdError(f"study: {value!r} is nothing that a study file can say")


def _frame(text: str) -> pd.DataFrame:
    # A model may be called "NA".
    return pd.read_csv(io.StringIO(text), keep_default_na=False, na_values=["", "nan"])
