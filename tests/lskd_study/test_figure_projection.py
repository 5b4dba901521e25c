"""Fig. 1: what is measured, its intervals, and that the CSV holds what the picture shows."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from matplotlib.collections import PathCollection

from lskd import LskdError
from lskd_study.drawing import projection as figure
from lskd_study.teachers.outputs import Outputs
from simulated import rows

pytestmark = pytest.mark.unit
NAMES = ("tench", "toy poodle", "miniature poodle", "hen")


def teacher(name="plain", per_class=30, width=12, seed=0, spread=1.0):
    """Clusters around their templates; classes 1 and 2 are near each other."""
    g = torch.Generator().manual_seed(seed)
    templates = torch.randn(4, width, generator=g)
    templates[2] = templates[1] + 0.3 * torch.randn(width, generator=g)
    labels = torch.arange(4).repeat(per_class)
    features = 3 * templates[labels] + spread * torch.randn(len(labels), width, generator=g)
    return Outputs(name, features @ templates.T, labels, None, NAMES, features, templates)


@pytest.fixture(scope="module")
def panels():
    return [
        figure.measure_projection(
            teacher(name, count, seed=seed, spread=spread), split, (1, 2, 0), 200, seed=0
        )
        for seed, (name, spread) in enumerate([("plain", 1.0), ("smoothed", 0.4)])
        for split, count in (("train", 40), ("val", 15))
    ]


def test_named_classes_own_templates_are_used():
    """Not the first three rows, and examples of no other class."""
    outputs = teacher()
    found = figure.measure_projection(outputs, "val", (3, 1, 0), 100, seed=0)
    w = outputs.templates[[3, 1, 0]].double().numpy()
    across = (w[1] - w[0]) / np.linalg.norm(w[1] - w[0])
    up = (w[2] - w[0]) - across * (across @ (w[2] - w[0]))
    for c, position in ((3, 0), (1, 1), (0, 2)):
        x = outputs.features[outputs.labels == c].double().numpy() - (w[0] + w[1]) / 2
        expected = np.stack([x @ across, x @ up / np.linalg.norm(up)], 1)
        np.testing.assert_allclose(found.points[found.position == position].numpy(), expected, atol=1e-9)
        assert outputs.labels[found.samples[found.position == position]].unique().tolist() == [c]
    assert found.names == ("hen", "toy poodle", "tench")


def test_csv_holds_what_is_drawn(panels):
    drawing = figure.projection_figure(panels)
    table, distances = rows(drawing.tables[""]), rows(drawing.tables["distances"])
    drawn = [axes for axes in drawing.figure.axes if axes.get_title(loc="left")]
    assert len(drawn) == 4
    for axes, (name, split) in zip(
        drawn, [("plain", "train"), ("plain", "val"), ("smoothed", "train"), ("smoothed", "val")], strict=True
    ):
        assert axes.get_title(loc="left").startswith(f"{name}, {split} (")
        clouds = [c for c in axes.collections if isinstance(c, PathCollection)]
        for cloud, label in zip(clouds, ("toy poodle", "miniature poodle", "tench"), strict=True):
            written = [
                (float(r["x"]), float(r["y"]))
                for r in table
                if (r["teacher"], r["split"], r["class"]) == (name, split, label)
            ]
            np.testing.assert_allclose(cloud.get_offsets(), written, rtol=1e-6)
        text = " ".join(t.get_text() for t in axes.texts)
        own = [r for r in distances if (r["teacher"], r["split"]) == (name, split)]
        assert len(own) == 10
        for r in own:
            value, low, high = (float(r[key]) for key in ("value", "low", "high"))
            assert f"{value:#.3g} [{low:#.3g}, {high:#.3g}]" in text


def test_distances_can_be_had_from_the_points_of_the_csv(panels):
    drawing = figure.projection_figure(panels[:1])
    table = rows(drawing.tables[""])
    a, b, c = (
        np.array([[float(r["x"]), float(r["y"])] for r in table if r["class"] == name])
        for name in ("toy poodle", "miniature poodle", "tench")
    )
    distance = np.linalg.norm(c - (a.mean(0) + b.mean(0)) / 2, axis=1)
    near, far = np.quantile(distance, [0.05, 0.95])
    stray = sum(((x - x.mean(0)) ** 2).sum() / (len(x) - 1) / len(x) for x in (a, b))
    expected = {
        "centre_distance": np.sqrt(((a.mean(0) - b.mean(0)) ** 2).sum() - stray),
        "nearest": near,
        "farthest": far,
        "relative_spread": (far - near) / distance.mean(),
    }
    plane = {r["quantity"]: r for r in rows(drawing.tables["distances"]) if r["space"] == "plane"}
    for name, value in expected.items():
        assert float(plane[name]["value"]) == pytest.approx(value, rel=1e-6)
        assert float(plane[name]["low"]) <= value <= float(plane[name]["high"])


def test_one_scale_for_a_teacher_and_every_point_within(panels):
    axes = [a for a in figure.projection_figure(panels).figure.axes if a.get_title(loc="left")]
    for first, second in ((axes[0], axes[1]), (axes[2], axes[3])):
        assert first.get_xlim() == second.get_xlim()
        assert first.get_ylim() == second.get_ylim()
    assert axes[0].get_xlim() != axes[2].get_xlim()
    for panel, own in zip(panels, axes, strict=True):
        low, high = np.transpose([own.get_xlim(), own.get_ylim()])
        assert bool(((panel.points.numpy() > low) & (panel.points.numpy() < high)).all())


def test_a_seed_gives_the_same_intervals_again():
    first, again = (figure.measure_projection(teacher(), "val", (1, 2, 0), 100, seed=3) for _ in range(2))
    other = figure.measure_projection(teacher(), "val", (1, 2, 0), 100, seed=4)
    assert first.in_plane == again.in_plane
    assert first.in_plane != other.in_plane


@pytest.mark.parametrize(("width", "gap"), [(2, 1.0), (128, 0.5)])
def test_intervals_cover_the_truth(width, gap):
    """100 simulated data sets of 50 examples a class; quantiles of 50 values are covered a little less."""
    g = torch.Generator().manual_seed(0)
    scale = torch.linspace(2, 0.3, width, dtype=torch.float64)
    scale /= scale.norm()
    centres = torch.zeros(3, width, dtype=torch.float64)
    centres[1, 0], centres[2, 1] = gap, 3.0

    def draw(size):
        return [c + scale * torch.randn(size, width, generator=g, dtype=torch.float64) for c in centres]

    far = np.linalg.norm((draw(100_000)[2] - (centres[0] + centres[1]) / 2).numpy(), axis=1)
    near, farthest = np.quantile(far, [0.05, 0.95])
    truth = {
        "centre_distance": gap,
        "separation": gap,
        "nearest": near,
        "farthest": farthest,
        "relative_spread": (farthest - near) / far.mean(),
    }
    covered = dict.fromkeys(truth, 0)
    for _ in range(100):
        groups = draw(50)
        drawn = [torch.randint(50, (200, 50), generator=g) for _ in groups]
        found = figure._estimates(torch.cat(groups), [50, 50, 50], drawn)
        for name, value in truth.items():
            covered[name] += found[name].low <= value <= found[name].high
    for name, count in covered.items():
        assert count >= 90 if name in ("centre_distance", "separation") else count >= 82, covered


def test_outputs_of_two_networks_are_refused():
    good = teacher()
    figure.check_splits({"train": [good], "val": [good]})
    for other, words in (
        (teacher(width=7), "12 wide on train and 7 on val"),
        (teacher(seed=5), "weight differs"),
        (replace(good, templates=None), "has no classifier's weight"),
    ):
        with pytest.raises(LskdError, match=words):
            figure.check_splits({"train": [good], "val": [other]})


def test_a_teacher_whose_other_classes_are_not_finite_is_drawn():
    templates = teacher().templates.clone()
    templates[3] = torch.nan
    figure.check_splits({"val": [replace(teacher(), templates=templates)]})
