"""Tables and figures of a study of image classifiers."""

from lskd_study.drawing.curves import curve_figure, curve_panels, drawable
from lskd_study.drawing.figure6 import figure6, figure6_panels, has_test_loss
from lskd_study.drawing.style import save
from lskd_study.pages.contents import Contents, student_kinds
from lskd_study.pages.page import Curves
from lskd_study.pages.paper_figures import study_figures
from lskd_study.pages.paper_table_files import layout_files
from lskd_study.pages.paper_tables import papers_layouts, published_layout
from lskd_study.pages.tables import markdown, runs_csv, table_csv, table_rows
from lskd_study.results.images import ImageResult
from lskd_study.results.results import Results


def image_contents(results: Results[ImageResult]) -> Contents:
    """Draw the figures into the output folder; return tables and curves.

    Raises:
        OSError: when the folder cannot be written.
    """
    plan = results.plan
    folder = plan.root / "figures"
    rows = table_rows(results)
    files = {"table.csv": table_csv(rows), "table.md": markdown(rows), "runs.csv": runs_csv(results)}
    shown = []
    for index, kind in enumerate(student_kinds(plan)):
        arms = {
            alpha: results.students(kind.model, kind.teacher, alpha, kind.temperature, kind.hard_weight)
            for alpha in plan.smoothing
        }
        if not drawable(arms):
            continue
        save(curve_figure(arms, kind.title), folder / kind.file("curves"))
        shown.append(Curves(kind.title, curve_panels(arms, f"curve{index}")))
        if has_test_loss(arms):
            save(figure6(arms, kind.title), folder / kind.file("figure6"))
            heading = f"{kind.title}, as the paper’s Fig. 6: loss on training and test images, test error"
            shown.append(Curves(heading, figure6_panels(arms, f"figure6-{index}")))
    layouts = papers_layouts([results])
    if (published := published_layout(results)) is not None:
        layouts.append(published)
    drawn = study_figures(results)
    for figure in drawn:
        figure.write(folder)
    own = {"rows": rows, "layouts": layouts, "drawn": drawn}
    return Contents({**files, **layout_files(layouts)}, shown, own)
