"""The task on tiny modules: timm's contract, the teacher's seclusion, parity with timm's own distillation."""

import copy

import pytest
import timm
import torch
from timm.task import LogitDistillationTask
from torch import nn
from torch.nn import functional

from lskd.teachers.frozen import FrozenTeacher, Normalisation
from timm_ls_kd.task import COLUMNS, LsKdTask, MultiLabelKdTask

pytestmark = pytest.mark.unit

HALF = Normalisation((0.5,) * 3, (0.5,) * 3)
IMAGENET = Normalisation((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
K = 5


class TinyModel(nn.Module):
    """Has everything that a teacher's mode and dtype can spoil."""

    num_classes, in_chans = K, 3

    def __init__(self):
        super().__init__()
        self.pretrained_cfg = {"mean": HALF.mean, "std": HALF.std}
        self.conv = nn.Conv2d(3, 8, 3)
        self.bn = nn.BatchNorm2d(8)
        self.drop = nn.Dropout(0.5)
        self.fc = nn.Linear(8, K)

    def forward(self, x):
        return self.fc(self.drop(self.bn(self.conv(x)).relu().mean((2, 3))))


@pytest.fixture
def models():
    torch.manual_seed(0)
    student, teacher = TinyModel(), TinyModel()
    for model in (student, teacher):
        model.fc.weight.data.mul_(20)
    teacher(torch.randn(64, 3, 8, 8))  # BatchNorm statistics that are not the initial ones
    return student, teacher


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(1)
    return torch.randn(12, 3, 8, 8, generator=generator), torch.randint(0, K, (12,), generator=generator)


def make_task(models, teacher_norm=HALF, **kwargs):
    student, teacher = models
    return LsKdTask(student, FrozenTeacher(teacher, teacher_norm, HALF), **kwargs)


def test_paper_mode_is_cross_entropy_with_the_teacher(models, batch):
    task = make_task(models)
    student, teacher = (model.eval() for model in models)
    loss = task(*batch)["loss"]
    logits, soft = student(batch[0]).double(), teacher(batch[0]).double()
    expected = -(soft.softmax(-1) * logits.log_softmax(-1)).sum(-1).mean()
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=0)


def test_gradients_equal_those_of_timms_task(models, batch):
    """Half hard, half soft at T = 4 with T^2; the values differ by the teacher's entropy alone."""
    ours, theirs = copy.deepcopy(models[0]).eval(), copy.deepcopy(models[0]).eval()
    task = make_task((ours, models[1]), hard_weight=0.5, temperature=4.0, temperature_squared=True)
    timms = LogitDistillationTask(
        theirs,
        copy.deepcopy(models[1]),
        criterion=nn.CrossEntropyLoss(),
        distill_loss_weight=0.5,
        task_loss_weight=0.5,
        temperature=4.0,
        verbose=False,
    )
    result, reference = task(*batch), timms(*batch)
    constant = 0.5 * 16 * result["teacher_entropy"]
    torch.testing.assert_close(result["loss"] - constant, reference["loss"], rtol=1e-5, atol=1e-5)
    result["loss"].backward()
    reference["loss"].backward()
    for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, other.grad, rtol=1e-4, atol=1e-6)
        assert mine.grad.abs().sum() > 0


@pytest.mark.parametrize(("convention", "on", "off"), [("paper", 0.8, 0.05), ("uniform", 0.84, 0.04)])
def test_hard_term_is_smoothed_as_asked(models, batch, convention, on, off):
    task = make_task(models, hard_weight=1.0, alpha=0.2, convention=convention)
    models[0].eval()
    rows = torch.full((12, K), off).scatter_(1, batch[1][:, None], on)
    expected = functional.cross_entropy(models[0](batch[0]), rows)
    torch.testing.assert_close(task(*batch)["loss"], expected)
    # Mixup has smoothed already: its rows are used as they are.
    torch.testing.assert_close(task(batch[0], rows)["loss"], expected)


def test_teacher_is_outside_the_task(models, batch):
    task = make_task(models)
    assert set(task.state_dict()) == {f"trainable_module.{key}" for key in models[0].state_dict()}
    assert sum(1 for _ in task.parameters()) == sum(1 for _ in models[0].parameters())
    assert set(task.get_checkpoint_state()["state_dict"]) == set(models[0].state_dict())
    ema = task.setup_ema(decay=0.5)
    assert set(ema.module.state_dict()) == set(models[0].state_dict())
    assert not any(parameter.requires_grad for parameter in models[1].parameters())


def test_moving_the_task_moves_the_teacher(models):
    task = make_task(models, teacher_norm=IMAGENET)
    task.to("meta")
    assert {parameter.device.type for parameter in models[1].parameters()} == {"meta"}
    assert task.device.type == "meta"
    assert task.teacher.device.type == "meta"


def test_half_precision_student_leaves_the_teacher_alone(models):
    task = make_task(models)
    task.to(torch.bfloat16)
    assert models[0].fc.weight.dtype == torch.bfloat16
    assert models[1].fc.weight.dtype == torch.float32


def test_compiled_task_gives_the_same(models, batch):
    models[0].eval()
    task = make_task(models)
    before = task(*batch)["loss"]
    task.compile(backend="eager")
    models[0].eval()
    torch.testing.assert_close(task(*batch)["loss"], before)
    assert set(task.get_checkpoint_state()["state_dict"]) == set(models[0].state_dict())


def test_epoch_metrics_are_means_over_samples(models, batch):
    models[0].eval()
    task = make_task(models, hard_weight=0.3)
    images, labels = batch
    whole = task(images, labels)
    task.epoch_metrics()
    task(images[:9], labels[:9])
    task(images[9:], labels[9:])
    with torch.no_grad():
        task(images[:2], labels[:2])  # not a training step
    metrics = task.epoch_metrics()
    assert list(metrics) == list(COLUMNS)
    for name, value in metrics.items():
        assert value == pytest.approx(float(whole[name]), rel=1e-5)
    assert metrics["ce"] == pytest.approx(metrics["kl"] + metrics["teacher_entropy"], rel=1e-5)
    assert all(value != value for value in task.epoch_metrics().values())  # started anew


@pytest.mark.parametrize("broadcast", [True, False])
def test_distributing_uses_nothing_deprecated(models, broadcast):
    import warnings

    task = make_task(models)
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", FutureWarning)
            task.prepare_distributed(broadcast_buffers=broadcast)
        wrapped = task.trainable_module
        synced = getattr(wrapped, "forward_sync_buffers", None)
        assert (wrapped.broadcast_buffers if synced is None else synced) is broadcast
    finally:
        torch.distributed.destroy_process_group()


def test_gradients_are_accumulated_as_upstream_does_it(models, batch):
    """Its train.py divides the loss in place, `loss /= accum_steps`, and steps after so many batches."""
    whole, parts = copy.deepcopy(models[0]).eval(), copy.deepcopy(models[0]).eval()
    make_task((whole, models[1]), hard_weight=0.3)(*batch)["loss"].backward()
    task = make_task((parts, models[1]), hard_weight=0.3)
    for half in (slice(0, 6), slice(6, 12)):
        loss = task(batch[0][half], batch[1][half])["loss"]
        loss /= 2
        loss.backward()
    for one, other in zip(whole.parameters(), parts.parameters(), strict=True):
        torch.testing.assert_close(other.grad, one.grad, rtol=1e-4, atol=1e-6)


def test_distilled_deit_trains_on_its_first_head_and_is_evaluated_as_timm_does(batch):
    torch.manual_seed(0)
    model = timm.create_model(
        "deit_tiny_distilled_patch16_224", pretrained=False, img_size=8, patch_size=4, num_classes=K, depth=1
    )
    for head in (model.head, model.head_dist):
        nn.init.normal_(head.weight)
    model.set_distilled_training()
    task = LsKdTask(model, FrozenTeacher(TinyModel(), HALF, HALF))
    task.train()
    both = model(batch[0])
    assert torch.equal(task(*batch)["output"], both[0])
    model.eval()
    torch.testing.assert_close(model(batch[0]), (both[0] + both[1]) / 2)
    assert torch.equal(FrozenTeacher(model, HALF, HALF)(batch[0]), model(batch[0]))


def test_criterion_is_the_hard_term_and_another_takes_its_place(models, batch):
    """As in timm's tasks: a module of its own, in the task's mode and on its device."""
    models[0].eval()
    options = {"hard_weight": 0.3, "alpha": 0.2, "convention": "paper"}
    task = make_task(models, **options)
    result = task(*batch)
    torch.testing.assert_close(task.criterion(result["output"], batch[1]), result["hard_ce"])
    soft = 0.7 * result["ce"] + 0.3 * functional.multi_margin_loss(result["output"], batch[1])
    other = make_task(models, criterion=nn.MultiMarginLoss(), **options)
    torch.testing.assert_close(other(*batch)["loss"], soft)
    for mode in (True, False):
        assert task.train(mode) is task
        assert {each.training for each in (*task.trainable_module.modules(), task.criterion)} == {mode}
        assert not any(each.training for each in models[1].modules())


def test_evaluator_and_state_are_timms(models, batch):
    task = make_task(models)
    evaluator = task.create_evaluator(max_samples=10)
    logits = task.get_eval_model()(batch[0])
    evaluator.update(logits, batch[1])
    right = 100 * float((logits[:10].argmax(-1) == batch[1][:10]).float().mean())
    assert evaluator.compute()["top1"] == pytest.approx(right)
    assert task.get_task_state() == {}
    assert list(task.get_checkpoint_state()) == ["state_dict"]
    other = make_task(copy.deepcopy(models))
    nn.init.zeros_(other.trainable_module.fc.weight)
    other.compile(backend="eager")
    other.load_checkpoint_state(**task.get_checkpoint_state())
    assert torch.equal(other.trainable_module.fc.weight, models[0].fc.weight)


def test_multilabel_hard_term_and_evaluator_are_timms(models, batch):
    from timm.task import MultiLabelClassificationTask

    student, teacher = models
    student.eval()
    labels = nn.functional.one_hot(batch[1], K).float() + nn.functional.one_hot((batch[1] + 1) % K, K)
    timms = MultiLabelClassificationTask(student, criterion_kwargs={"smoothing": 0.2}, threshold=0.3)
    frozen = FrozenTeacher(teacher, HALF, HALF)
    task = MultiLabelKdTask(student, frozen, threshold=0.3, hard_weight=0.4, alpha=0.2, temperature=2.0)
    result = task(batch[0], labels)
    torch.testing.assert_close(result["hard_ce"], timms(batch[0], labels)["loss"])
    soft = functional.binary_cross_entropy_with_logits(
        student(batch[0]) / 2, (teacher(batch[0]) / 2).sigmoid()
    )
    torch.testing.assert_close(result["loss"], 0.4 * result["hard_ce"] + 0.6 * soft)
    evaluators = [each.create_evaluator(max_samples=10) for each in (task, timms)]
    for each in evaluators:
        each.update(result["output"], labels)
    assert evaluators[0].compute() == evaluators[1].compute()


def test_the_loss_is_float32_under_autocast(models, batch):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = make_task(models)(*batch)
    assert result["loss"].dtype == torch.float32
    assert torch.isfinite(result["loss"])
