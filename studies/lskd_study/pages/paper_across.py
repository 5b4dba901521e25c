"""Tables and figures of the paper that it takes several studies to fill, from their output folders."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from lskd import LskdError
from lskd_study.pages.paper_figures import PageFigure, accuracy_stability, figure8, figure9
from lskd_study.pages.paper_table_cells import Layout
from lskd_study.pages.paper_tables import layout_of
from lskd_study.plan.matching import names_table
from lskd_study.plan.plan import PLAN, Plan
from lskd_study.results.images import ImageResult
from lskd_study.results.read import read_results
from lskd_study.results.results import Results, is_translation

Study = Results[ImageResult]


def read_studies(folders: Sequence[Path], tables: Sequence[str] = ()) -> list[Study]:
    """Return the results of the studies in these output folders, which may have been moved.

    Args:
        folders: of ``lskd study``.
        tables: only studies of images that name one of these; all for none.

    Raises:
        LskdError: for a folder that holds no study of images, if all are wanted, or whose runs are damaged.
    """
    found = []
    for folder in folders:
        if not (folder / PLAN).is_file():
            if tables:
                continue
            raise LskdError(f"{folder} holds no study ({PLAN} is missing); name the output folder of one")
        plan = Plan.read(folder / PLAN)
        if is_translation(plan) or (tables and not names_table(plan, tables)):
            if tables:
                continue
            raise LskdError(f"{folder} holds a study of translation, which has no accuracies; leave it out")
        whole = folder.resolve()
        found.append(read_results(replace(plan, cwd=str(whole.parent), output=whole.name)))
    return found


def shared_tables(folders: Sequence[Path]) -> tuple[list[Layout], list[PageFigure]]:
    """Return the paper's tables that two or more of these studies name, filled by all of them, and figures.

    With Table 8 come Fig. 8 and stability against accuracy, with Table 4 Fig. 9. Studies that no other shares
    a table with are not read.

    Raises:
        LskdError: for runs that are damaged.
    """
    named: dict[str, list[Path]] = {}
    for folder in folders:
        if (folder / PLAN).is_file():
            for name in Plan.read(folder / PLAN).paper:
                named.setdefault(name, []).append(folder)
    shared = [name for name in _ORDER if len(named.get(name, ())) > 1]
    if not shared:
        return [], []
    studies = [results for results in read_studies(folders, shared) if results.finished]
    layouts, figures = [], []
    for name in shared:
        own = [results for results in studies if name in results.plan.paper]
        layouts.append(layout_of(name, own))
        if name == "Table 8":
            figures += [figure8(own), accuracy_stability(own)]
        if name == "Table 4":
            figures.append(figure9(own))
    return layouts, [figure for figure in figures if figure is not None]


_ORDER = ("Table 2", "Table 3", "Table 4", "Table 6", "Table 7", "Table 8", "Table 9", "Fig. 5", "Fig. 6")
