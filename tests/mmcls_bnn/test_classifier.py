"""The distilling classifier: its loss against NumPy, and what the teacher must never be part of."""

import copy
import math

import numpy as np
import pytest
import torch
from scipy.special import log_softmax, softmax

from lskd import LskdError
from mmcls_bnn.distil.classifier import DistillationMetric, RememberedAnswers

pytestmark = pytest.mark.unit


def by_hand(student, teacher, labels, temperature=1.0):
    """Cross-entropy, KL, entropy, hard cross-entropy and agreement, means in float64."""
    s, t = student.detach().double().numpy(), teacher.detach().double().numpy()
    p, log_p = softmax(t / temperature, -1), log_softmax(t / temperature, -1)
    log_q = log_softmax(s / temperature, -1)
    return {
        "loss_ce": -(p * log_q).sum(-1).mean(),
        "loss_kl": (p * (log_p - log_q)).sum(-1).mean(),
        "teacher_entropy": -(p * log_p).sum(-1).mean(),
        "loss_hard": -log_softmax(s, -1)[np.arange(len(labels)), labels].mean(),
        "agreement": (s.argmax(-1) == t.argmax(-1)).mean(),
    }


def logits_of(model, images):
    return model.head(model.extract_feat(images))


@pytest.fixture
def images():
    return torch.randn(6, 1, 16, 16, generator=torch.Generator().manual_seed(3))


def test_loss_is_soft_labels_alone(student, build, samples, images):
    model = build(student).train()
    labels = [0, 1, 2, 3, 0, 1]
    twin = copy.deepcopy(model)
    losses = model.loss(images, samples(labels))
    expected = by_hand(logits_of(twin, images), model.load_teacher()(images), labels)
    for name, value in expected.items():
        assert losses[name].item() == pytest.approx(value, rel=1e-5), name
        assert not losses[name].requires_grad
    total, log = model.parse_losses(losses)
    assert total.item() == pytest.approx(expected["loss_ce"], rel=1e-5)
    assert total.requires_grad
    assert log["loss"].item() == total.item()  # not the sum of everything called loss


def test_hard_weight_temperature_and_mixed_labels(student, build, samples, images):
    student["distillation"] = {"hard_weight": 0.25, "temperature": 2.0, "temperature_squared": True}
    model = build(student).train()
    twin = copy.deepcopy(model)
    scores = torch.softmax(torch.randn(6, 4, generator=torch.Generator().manual_seed(4)), -1)
    loss = model.loss(images, samples([0] * 6, scores))["loss"]
    logits = logits_of(twin, images)
    soft = by_hand(logits, model.load_teacher()(images), [0] * 6, 2.0)["loss_ce"]
    hard = -(scores.double().numpy() * log_softmax(logits.detach().double().numpy(), -1)).sum(-1).mean()
    assert loss.item() == pytest.approx(0.75 * 4 * soft + 0.25 * hard, rel=1e-5)


def test_epoch_means_weigh_every_sample_once(student, build, samples, images):
    model = build(student).eval()  # BatchNorm must not make the batches differ
    model.loss(images, samples([0, 1, 2, 3, 0, 1]))
    model.loss(images[:2], samples([3, 3]))
    both = torch.cat([images, images[:2]])
    expected = by_hand(logits_of(model, both), model.load_teacher()(both), [0, 1, 2, 3, 0, 1, 3, 3])
    assert model.epoch_means() == pytest.approx(expected, rel=1e-5)
    assert all(math.isnan(value) for value in model.epoch_means().values())


@pytest.mark.parametrize(("alpha", "convention"), [(0.0, "paper"), (0.1, "uniform"), (0.1, "paper")])
def test_a_student_without_its_teacher_learns_from_labels(student, build, samples, images, alpha, convention):
    student["teacher"]["checkpoint"] = "nowhere.pth"  # and would be missed
    student["distillation"] = {
        "alpha": alpha,
        "convention": convention,
        "temperature": 4.0,
        "soft_labels": {"path": "nowhere"},
    }
    model = build({**student, "type": "UntaughtClassifier"})
    model.init_weights()
    assert model.teacher is None
    twin, labels = copy.deepcopy(model.train()), [0, 1, 2, 3, 0, 1]
    losses = model.loss(images, samples(labels))
    log_q = log_softmax(logits_of(twin, images).detach().double().numpy(), -1)
    eps = alpha if convention == "uniform" else alpha * 4 / 3  # of torch, which shares among all classes
    targets = (1 - eps) * np.eye(4)[labels] + eps / 4
    expected = -(targets * log_q).sum(-1).mean()
    assert losses["loss"].item() == pytest.approx(expected, rel=1e-5)
    model.parse_losses(losses)[0].backward()
    assert model.epoch_means() == pytest.approx({"loss_hard": expected}, rel=1e-5)
    metric = DistillationMetric()
    predictions = model.eval().predict(images, samples(labels))
    metric.process(None, [sample.to_dict() for sample in predictions])
    assert metric.evaluate(6) == {}


@pytest.mark.parametrize("kind", ["LsKdClassifier", "UntaughtClassifier"])
@pytest.mark.parametrize(
    "made", [{"to_onehot": True}, {"batch_augments": {"augments": {"type": "Mixup", "alpha": 0.8}}}]
)
def test_labels_that_the_preprocessor_makes_are_smoothed(student, build, samples, kind, made):
    student["data_preprocessor"].update(made)
    student["distillation"] = {"hard_weight": 1.0, "alpha": 0.3}
    model = build({**student, "type": kind}).train()
    twin = copy.deepcopy(model)
    batch = {"inputs": torch.rand(4, 1, 16, 16) * 255, "data_samples": samples([0, 1, 2, 3])}
    batch = model.data_preprocessor(batch, training=True)
    scores = np.stack([sample.gt_label.score.double().numpy() for sample in batch["data_samples"]])
    loss = model.loss(**batch)["loss"]
    log_q = log_softmax(logits_of(twin, batch["inputs"]).detach().double().numpy(), -1)
    smoothed = 0.7 * scores + 0.3 / 3 * (1 - scores)  # Eq. 1
    assert loss.item() == pytest.approx(-(smoothed * log_q).sum(-1).mean(), rel=1e-5)


def test_metric_is_the_loss_on_the_validation_set(student, build, samples, images):
    model = build(student).eval()
    model.load_teacher()
    metric = DistillationMetric()
    for start in (0, 4):
        predictions = model.predict(images[start : start + 4], samples([0] * len(images[start : start + 4])))
        metric.process(None, [sample.to_dict() for sample in predictions])
    found = metric.evaluate(6)
    expected = by_hand(logits_of(model, images), model.load_teacher()(images), [0] * 6)
    names = {"cross_entropy": "loss_ce", "kl": "loss_kl"}
    names |= {name: name for name in ("teacher_entropy", "agreement")}
    wanted = {f"distillation/{name}": expected[key] for name, key in names.items()}
    assert found == pytest.approx(wanted, rel=1e-5)


def test_testing_needs_no_teacher(student, build, samples, images):
    student["teacher"]["checkpoint"] = "nosuch.pth"
    predictions = build(student).eval().predict(images, samples([0] * 6))
    assert all(sample.pred_label.score.sum().item() == pytest.approx(1) for sample in predictions)
    with pytest.raises(LskdError, match="take it out of test_evaluator"):
        DistillationMetric().process(None, [predictions[0].to_dict()])


def test_teacher_follows_the_student(student, build):
    model = build(student)
    model.load_teacher()
    model.to("meta")
    assert {p.device.type for p in model.teacher.model.parameters()} == {"meta"}


def stored(soft_labels):
    return {"distillation": {"soft_labels": soft_labels}}


def fast(teacher_fast):
    return {"distillation": {"teacher_fast": teacher_fast}}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"teacher": None}, "needs a teacher"),
        ({"teacher": {"checkpoint": "t.pth", "modell": "resnet50"}}, "unknown key 'modell'"),
        ({"teacher": "t.pth"}, "model.teacher is 't.pth'; give dict"),
        ({"teacher": {"model": "resnet50"}}, "names no checkpoint"),
        ({"teacher": {"checkpoint": "t.pth"}}, "needs model"),
        ({"teacher": {"checkpoint": "t.pth", "source": "mmcls"}}, "needs config"),
        ({"teacher": {"checkpoint": "t.pth", "model": "a", "source": "keras"}}, "source 'keras'"),
        ({"teacher": {"checkpoint": "t.pth", "model": "a", "mean": [0]}}, "mean or std alone"),
        ({"teacher": {"checkpoint": "t.pth", "model": "a", "smoothing": 2}}, "alpha is 2"),
        ({"distillation": {"temperature": 0}}, "temperature"),
        ({"distillation": {"temprature": 1}}, "temprature"),
        (stored("labels"), "soft_labels is 'labels'; give dict"),
        (stored({"path": ""}), "names no folder"),
        (stored({"path": "labels", "topk": 3}), "unknown key 'topk'"),
        (stored({"path": "labels", "top_k": -1}), "top_k is -1"),
        (stored({"path": "labels", "values": "int8"}), "values is 'int8'; it must be float16 or float32"),
        (stored({"path": "labels", "rest": "no"}), "rest is 'no'"),
        (stored({"path": "labels", "on_error": "no"}), "on_error is 'no'"),
        (fast("auto"), "teacher_fast is 'auto'; give dict"),
        (fast({"mode": "int4"}), "teacher_fast.mode is 'int4'; it must be one of none, auto"),
        (fast({"modes": "auto"}), "unknown key 'modes'; there are mode, bound"),
        (fast({"bound": 0}), "teacher_fast.bound is 0"),
        (fast({"bound": math.nan}), "teacher_fast.bound is nan"),
    ],
)
def test_wrong_settings_are_one_line(student, build, changes, words):
    with pytest.raises(LskdError, match=words) as error:
        build({**student, **changes})
    assert "\n" not in str(error.value)


def test_the_teacher_is_asked_once_about_the_same_validation_images(student, build, samples, images):
    model = build(student).eval()
    teacher, asked = model.load_teacher(), []
    answer = teacher.answer
    teacher.answer = lambda batch: asked.append(len(batch)) or answer(batch)

    def terms(batch):
        return torch.stack(
            [sample.distillation for sample in model.predict(batch, samples([0] * len(batch)))]
        )

    first = terms(images)
    assert torch.equal(terms(images), first)
    torch.testing.assert_close(terms(images.flip(0)), first.flip(0))  # in any order
    assert asked == [6]
    other = images.clone()
    other[2, 0, 3, 3] += 1e-6
    terms(other)
    assert asked == [6, 6]
    model._answers = RememberedAnswers(limit=6 * 4 * 4 - 1)
    assert torch.equal(terms(images), first)
    assert torch.equal(terms(images), first)
    assert asked == [6] * 4  # too large to be remembered
