import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lskd import LskdError
from lskd.analysis.projection import cluster_distances, project

pytestmark = pytest.mark.unit
PROPERTY = settings(deadline=None, max_examples=40, derandomize=True, database=None)
QUANTITIES = ("centre_distance", "nearest", "farthest", "relative_spread", "separation")


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def gram_schmidt(w):
    """The same axes without a QR: along w2 - w1, and what w3 - w1 has beside that."""
    first = (w[1] - w[0]) / np.linalg.norm(w[1] - w[0])
    rest = (w[2] - w[0]) - first * (first @ (w[2] - w[0]))
    return np.stack([first, rest / np.linalg.norm(rest)]), (w[0] + w[1]) / 2


# The plane


@PROPERTY
@given(
    width=st.integers(2, 40),
    seed=st.integers(0, 999),
    scale=st.sampled_from([1e-3, 1.0, 1e3]),
    dtype=st.sampled_from([torch.float64, torch.float32]),
)
def test_coordinates_are_those_of_gram_schmidt(width, seed, scale, dtype):
    templates = normal(3, width, seed=seed, dtype=dtype) * scale
    features = normal(11, width, seed=seed + 1, dtype=dtype) * scale
    basis, origin = gram_schmidt(templates.double().numpy())
    expected = (features.double().numpy() - origin) @ basis.T
    np.testing.assert_allclose(project(features, templates).numpy(), expected, atol=1e-8 * scale, rtol=1e-7)


@PROPERTY
@given(width=st.integers(2, 30), seed=st.integers(0, 999))
def test_distances_in_the_plane_are_kept_and_the_templates_where_they_are_promised(width, seed):
    templates = normal(3, width, seed=seed)
    found = project(templates, templates)
    torch.testing.assert_close(torch.cdist(found, found), torch.cdist(templates, templates))
    (left, ground), (right, level), (_, above) = found.tolist()
    assert left == pytest.approx(-right)
    assert right > 0
    assert ground == pytest.approx(0, abs=1e-9)
    assert level == pytest.approx(0, abs=1e-9)
    assert above > 0


def test_rotation_of_the_feature_space_changes_nothing():
    templates, features = normal(3, 6), normal(9, 6, seed=1)
    rotation = torch.linalg.qr(normal(6, 6, seed=2))[0]
    turned = project(features @ rotation, templates @ rotation)
    torch.testing.assert_close(turned, project(features, templates))


FIRST, STEP = normal(8, dtype=torch.float32), normal(8, seed=1, dtype=torch.float32)
ON_ONE_LINE = [torch.stack([FIRST, FIRST + STEP, FIRST + along * STEP]) for along in (0, 0.5, 1, -3, 1e6)]


@pytest.mark.parametrize(
    ("templates", "kind", "message"),
    [
        *[(rows, LskdError, "on one line") for rows in ON_ONE_LINE],
        (torch.ones(3, 4), LskdError, "on one line"),
        (torch.tensor([[0.0], [1.0], [3.0]]), LskdError, "on one line"),
        (torch.full((3, 4), torch.inf), LskdError, "finite"),
        *[(torch.ones(shape), ValueError, "three") for shape in [(2, 4), (4, 4), (3,), (1, 3, 4)]],
    ],
)
def test_templates_that_span_no_plane(templates, kind, message):
    with pytest.raises(kind, match=message):
        project(templates, templates)
    with pytest.raises(ValueError, match="width 4"):
        project(normal(5, 3), normal(3, 4))


# The distances


def reference(a, b, c, population=False):
    a, b, c = (x.double().numpy() for x in (a, b, c))
    centres = [x.mean(0) for x in (a, b)]
    radii2 = []
    squared = ((centres[0] - centres[1]) ** 2).sum()
    for x, centre in zip((a, b), centres, strict=True):
        radii2.append(((x - centre) ** 2).sum() / (len(x) - (not population)))
        if not population:
            squared -= radii2[-1] / len(x)
    between = np.sqrt(max(squared, 0))
    distances = np.linalg.norm(c - (centres[0] + centres[1]) / 2, axis=1)
    near, far = np.quantile(distances, [0.05, 0.95])
    return between, near, far, (far - near) / distances.mean(), between / np.sqrt(np.mean(radii2))


def values(found):
    return torch.stack([getattr(found, name) for name in QUANTITIES]).numpy()


@PROPERTY
@given(
    sizes=st.tuples(st.integers(2, 30), st.integers(2, 30), st.integers(2, 30)),
    width=st.integers(1, 20),
    offset=st.sampled_from([0.0, 1e3]),
    population=st.booleans(),
    seed=st.integers(0, 999),
)
def test_distances(sizes, width, offset, population, seed):
    groups = [normal(n, width, seed=seed + i) + 3 * i + offset for i, n in enumerate(sizes)]
    found = cluster_distances(*groups, population=population)
    assert all(getattr(found, name).shape == () for name in QUANTITIES)
    np.testing.assert_allclose(values(found), reference(*groups, population), rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("population", [False, True])
def test_resamples_are_measured_like_the_data_themselves(population, monkeypatch):
    monkeypatch.setattr("lskd.analysis.projection._BLOCK", 60)  # several blocks
    groups = [normal(n, 4, seed=i) + 2 * i for i, n in enumerate((7, 12, 9))]
    generator = torch.Generator().manual_seed(1)
    rows = [torch.randint(len(g), (17, len(g)), generator=generator) for g in groups]
    found = values(cluster_distances(*groups, rows, population))
    for draw in range(17):
        expected = reference(*(g[r[draw]] for g, r in zip(groups, rows, strict=True)), population)
        np.testing.assert_allclose(found[:, draw], expected, rtol=1e-9, atol=1e-9)


def test_scale_of_the_features_does_not_change_what_is_relative():
    groups = [normal(20, 5, seed=i) + 2 * i for i in range(3)]
    one, two = values(cluster_distances(*groups)), values(cluster_distances(*(7 * g for g in groups)))
    np.testing.assert_allclose(two, one * [7, 7, 7, 1, 1], rtol=1e-9)


def test_few_examples_in_many_dimensions_do_not_move_centres_apart():
    """The plain distance of estimated centres is 0.2 larger here: sqrt(1 + 512 / 512 * 2 / 5)."""
    plain, corrected = [], []
    for seed in range(100):
        a, b, c = (normal(5, 512, seed=3 * seed + i) / 512**0.5 for i in range(3))
        b = b + torch.nn.functional.one_hot(torch.tensor(0), 512)
        plain.append(float(cluster_distances(a, b, c, population=True).centre_distance))
        corrected.append(float(cluster_distances(a, b, c).centre_distance))
    assert np.mean(plain) == pytest.approx(1.18, abs=0.02)
    assert np.mean(corrected) == pytest.approx(1.0, abs=0.02)


def test_bad_groups():
    with pytest.raises(LskdError, match="at least 2"):
        cluster_distances(normal(3, 2), normal(1, 2), normal(3, 2))
    with pytest.raises(ValueError, match="shapes"):
        cluster_distances(normal(3, 2), normal(3, 3), normal(3, 2))
    with pytest.raises(ValueError, match="row numbers"):
        cluster_distances(*[normal(3, 2)] * 3, [torch.zeros(2, 3, dtype=torch.long)] * 2)
