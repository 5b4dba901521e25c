"""The criterion in one process: settings, half precision, and what it refuses."""

import math

import pytest
import torch
from fairseq import utils
from fairseq.logging import metrics
from fairseq.tasks.translation import TranslationConfig, TranslationTask

from fairseq_kd.criterion import LsKdCriterion
from fairseq_kd.settings import LsKdConfig, resolve
from fairseq_kd.task import SoftLabelledPairs
from fairseq_kd.teacher import split_paths
from lskd import LskdError, SoftLabels
from lskd.terms import divergence

pytestmark = pytest.mark.unit


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"kd_weight": 1.5}, "--kd-weight is 1.5"),
        ({"kd_weight": -0.1}, "--kd-weight is -0.1"),
        ({"kd_weight": float("nan")}, "--kd-weight is nan"),
        ({"kd_temperature": 0.0}, "--kd-temperature is 0.0; it must be greater than 0"),
        ({"kd_temperature": float("inf")}, "--kd-temperature is inf"),
        ({"kd_top_k": 41}, "--kd-top-k is 41; it must be 0 .* to 40"),
        ({"kd_top_k": -1}, "--kd-top-k is -1"),
        ({"kd_sampled": 41}, "--kd-sampled is 41"),
        ({"kd_sampled": 4, "kd_preset": "tan2019"}, "--kd-sampled draws words at --kd-temperature 1"),
        ({"kd_sampled": 4, "kd_rest": "lump"}, "--kd-sampled leaves no other words; drop --kd-rest"),
        ({"kd_rest": "drop"}, "--kd-rest is 'drop'; it must be renormalise or spread or lump or restrict"),
        ({"kd_preset": "hinton"}, "--kd-preset 'hinton' does not exist; there are shen2021 and tan2019"),
        ({"kd_temperature_squared": "maybe"}, "--kd-temperature-squared is 'maybe'"),
        ({"smoothing_convention": "torch"}, "--smoothing-convention is 'torch'"),
        ({"label_smoothing": 1.0}, "--label-smoothing is 1.0"),
        ({"kd_alpha_schedule": "cosine"}, "--kd-alpha-schedule is 'cosine'"),
        ({"kd_alpha_interval": 0}, "--kd-alpha-interval is 0"),
        ({"kd_divergence": "kl"}, "--kd-divergence is 'kl'; it must be forward or reverse or jsd"),
        ({"kd_on_policy": 1.5}, "--kd-on-policy is 1.5; it is a share of the updates"),
        (
            {"kd_divergence": "jsd", "kd_preset": "tan2019"},
            "--kd-divergence jsd needs all .* add --kd-top-k 0",
        ),
        ({"kd_on_policy": 0.5, "kd_top_k": 4}, "--kd-on-policy needs all of the teacher's words"),
        ({"kd_on_policy": 0.5, "ignore_prefix_size": 1}, "leave out --ignore-prefix-size"),
    ],
)
def test_values_out_of_range_are_one_line(flags, message):
    with pytest.raises(LskdError, match=message) as caught:
        resolve(LsKdConfig(**flags), 40)
    assert "\n" not in str(caught.value)


def test_presets_and_what_overrides_them():
    def resolved(**flags):
        return resolve(LsKdConfig(**flags), 40)

    tan = resolved(kd_preset="tan2019")
    assert (tan.weight, tan.temperature, tan.temperature_squared, tan.top_k) == (0.9, 0.6, True, 8)
    assert (tan.rest, tan.label_smoothing, tan.convention) == ("renormalise", 0.1, "uniform")
    assert resolved() == resolved(kd_preset="shen2021")
    assert resolved().rest == "lump"
    assert resolved(kd_sampled=7).rest == "renormalise"  # drawn words stand for all
    changed = resolved(
        kd_preset="tan2019", kd_temperature=2.0, kd_temperature_squared="false", label_smoothing=0.0
    )
    assert (changed.temperature, changed.temperature_squared, changed.label_smoothing) == (2.0, False, 0.0)
    assert changed.top_k == 8
    assert resolved(kd_temperature_squared="True").temperature_squared


@pytest.fixture
def make(corpus):
    """Return a function that makes a task and its criterion, with the teacher unless it is told otherwise."""

    def build(**flags):
        where = {"data": str(corpus.data), "source_lang": "de", "target_lang": "en", "train_subset": "train"}
        config = TranslationConfig(**where, dataset_impl=None, required_seq_len_multiple=1)
        task = TranslationTask.setup_task(config)
        task.load_dataset("train")
        flags = {"kd_teacher": str(corpus.teacher), "sentence_avg": False} | flags
        return task, LsKdCriterion.build_criterion(LsKdConfig(**flags), task)

    return build


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_student_and_teacher(make, corpus, dtype):
    """What --bf16 and --fp16 do: weights in half precision, a loss scale before backward."""
    results = []
    for kind in (torch.float32, dtype):
        task, criterion = make(kd_weight=0.7)
        model = corpus.teach(corpus.teacher.with_name("checkpoint_last.pt")).models[0]
        torch.manual_seed(0)
        for parameter in model.parameters():
            parameter.data += 0.02 * torch.randn_like(parameter)
        model.to(kind).requires_grad_(True)
        criterion.train()
        for module in model.modules():
            module.training = False
        model.training = True  # the criterion distils; dropout stays off, so that the two can be compared
        loss, _, log = criterion(model, batch_of(task, 24))
        (loss * 128).backward()
        gradients = torch.cat(
            [p.grad.float().flatten() / 128 for p in model.parameters() if p.grad is not None]
        )
        assert next(criterion.teacher.models[0].parameters()).dtype == kind
        results.append((loss, gradients, log))
    (exact, exact_gradient, _), (loss, gradient, log) = results
    assert loss.dtype == torch.float32
    assert float(loss.detach()) == pytest.approx(float(exact.detach()), rel=0.02)
    assert torch.nn.functional.cosine_similarity(gradient, exact_gradient, dim=0) > 0.98
    assert log["kd_kl"] > 0


def test_autocast_reaches_the_teacher_and_leaves_its_weights(make, corpus):
    """What --amp does: weights in float32, forward passes in half precision."""
    losses = []
    for enabled in (False, True):
        task, criterion = make(kd_weight=0.7)
        criterion.train()
        model = corpus.teach(corpus.teacher.with_name("checkpoint_last.pt")).models[0].requires_grad_(True)
        model.training = True  # without dropout
        said, ask = [], criterion.teacher.logits
        criterion.teacher.logits = lambda net_input, ask=ask, said=said: (
            said.append(ask(net_input)) or said[0]
        )
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            losses.append(criterion(model, batch_of(task, 24))[0].item())
        assert said[0].dtype == (torch.bfloat16 if enabled else torch.float32)
        assert {p.dtype for p in criterion.teacher.models[0].parameters()} == {torch.float32}
    assert losses[1] == pytest.approx(losses[0], rel=0.02)


def test_teacher_is_no_part_of_the_criterion(make):
    _, criterion = make()
    assert criterion.teacher is None  # validation and generation do not need it
    before = torch.get_rng_state()
    criterion.train()
    assert torch.equal(torch.get_rng_state(), before)
    assert not list(criterion.parameters())
    assert not list(criterion.children())
    assert not criterion.state_dict()
    criterion.train()
    teacher = criterion.teacher.models[0]
    assert not any(module.training for module in teacher.modules())
    assert not any(parameter.requires_grad for parameter in teacher.parameters())


def test_what_the_plain_task_cannot_do_is_one_line(make):
    with pytest.raises(LskdError, match="has no teacher: give --kd-teacher FILE"):
        make(kd_teacher=None)
    make(kd_teacher=None, kd_weight=0.0)
    with pytest.raises(LskdError, match="needs --task translation_ls_kd"):
        make(kd_alpha_schedule="adaptive")


def test_paths_with_a_colon(tmp_path):
    one, other = str(tmp_path / "a:1.pt"), str(tmp_path / "b.pt")
    for path in (one, other):
        open(path, "w").close()
    assert split_paths(one) == [one]
    assert split_paths(f"{other}:{one}") == [other, one]
    assert split_paths(f"{one}:{other}") == [one, other]
    assert split_paths("no/a.pt:no/b.pt") == ["no/a.pt", "no/b.pt"]
    with pytest.raises(LskdError, match="give a file, or several as A:B"):
        split_paths("a.pt:")


class Logits(torch.nn.Module):
    """A student that says the same to everything of one shape."""

    def __init__(self, logits):
        super().__init__()
        self.logits = torch.nn.Parameter(logits)

    def forward(self, **_):
        return self.logits, None

    def get_normalized_probs(self, net_output, log_probs):
        return net_output[0].float().log_softmax(-1)

    def get_targets(self, sample, _):
        return sample["target"]


def batch_of(task, count=8):
    pairs = task.dataset("train")
    return pairs.collater([pairs[index] for index in range(count)])


def logged(criterion, log):
    with metrics.aggregate(new_root=True) as numbers:
        criterion.reduce_metrics([log])
    return numbers.get_smoothed_values()


def test_columns_are_means_of_the_tokens_that_count(make):
    """With --ignore-prefix-size: half of the tokens of short sentences do not."""
    task, criterion = make(kd_weight=0.5, ignore_prefix_size=2)
    criterion.train()
    sample = batch_of(task)
    torch.manual_seed(0)
    student = Logits(torch.randn(*sample["target"].shape, len(task.target_dictionary)))
    numbers = logged(criterion, criterion(student, sample)[2])
    target = sample["target"][:, 2:]
    counts = target != task.target_dictionary.pad()
    logs = student.logits[:, 2:].double().log_softmax(-1)[counts]
    teacher = criterion.teacher.logits(sample["net_input"])[:, 2:].double().softmax(-1)[counts]
    hard = torch.nn.functional.nll_loss(logs, target[counts])
    assert numbers["kd_hard_ce"] == pytest.approx(float(hard) / math.log(2), abs=1e-3)
    assert numbers["kd_ce"] == pytest.approx(float(-(teacher * logs).sum(-1).mean()) / math.log(2), abs=1e-3)
    assert numbers["kd_weight"] == 0.5


def test_what_drawn_words_cannot_say_is_not_logged(make):
    """A student that is the teacher: the cross-entropy of drawn words is right, their KL would not be 0."""
    task, criterion = make(kd_sampled=4)
    criterion.train()
    sample = batch_of(task)
    student = Logits(criterion.teacher.logits(sample["net_input"]).clone())
    numbers = logged(criterion, criterion(student, sample)[2])
    assert all(math.isnan(numbers[name]) for name in ("kd_kl", "kd_teacher_entropy", "kd_agreement"))
    assert all(math.isfinite(numbers[name]) for name in ("loss", "kd_ce", "kd_hard_ce"))


@pytest.mark.parametrize("kind", ["reverse", "jsd"])
def test_the_loss_is_labels_and_a_divergence(make, kind):
    """In float64 from its definition, with T^2; on the reference, and its number is logged.

    The teacher is asked once, and padding says nothing, not even NaN.
    """
    task, criterion = make(
        kd_weight=0.7, kd_divergence=kind, kd_temperature=2.0, kd_temperature_squared="true"
    )
    criterion.train()
    sample = batch_of(task)
    torch.manual_seed(0)
    student = Logits(torch.randn(*sample["target"].shape, len(task.target_dictionary)))
    target = sample["target"]
    counts = target != task.target_dictionary.pad()
    assert not counts.all()
    student.logits.data[~counts] = math.nan
    asked, ask = [], criterion.teacher.logits
    criterion.teacher.logits = lambda net_input: asked.append(1) or ask(net_input)
    loss, _, log = criterion(student, sample)
    loss.backward()
    assert len(asked) == 1
    assert student.logits.grad.isfinite().all()
    q, p = (
        z[counts].detach().double().div(2).softmax(-1)
        for z in (student.logits, criterion.teacher.logits(sample["net_input"]))
    )
    m = (p + q) / 2
    pairs = {"reverse": [(q, p)], "jsd": [(p, m), (q, m)]}[kind]
    soft = sum(float((a * (a / b).log()).sum()) for a, b in pairs) / len(pairs)
    hard = torch.nn.functional.cross_entropy(student.logits[counts], target[counts], reduction="sum").item()
    assert float(loss) == pytest.approx(0.7 * 4 * soft + 0.3 * hard, rel=1e-5)
    bits = 4 * soft / int(counts.sum()) / math.log(2)
    assert logged(criterion, log)["kd_divergence"] == pytest.approx(bits, abs=1e-3)


def test_the_teacher_judges_the_students_own_sentences(make, corpus):
    """The loss is the mean over the drawn words, taken as often as there are words in the reference."""
    task, criterion = make(kd_weight=1.0, kd_divergence="reverse", kd_on_policy=1.0)
    model = corpus.teach(corpus.teacher.with_name("checkpoint_last.pt")).models[0]
    criterion.train()
    model.train()
    model.encoder.eval()  # a mode of its own, that must be there afterwards
    sample = batch_of(task, 24)
    modes = [module.training for module in model.modules()]
    drawn = criterion._own_sentences(model, sample)
    assert [module.training for module in model.modules()] == modes
    longest, criterion.teacher.longest = criterion.teacher.longest, (1024, 4)
    assert criterion._own_sentences(model, sample)["target"].shape[1] == 4 < drawn["target"].shape[1]
    criterion.teacher.longest = longest
    dictionary = task.target_dictionary
    before, target = drawn["net_input"]["prev_output_tokens"], drawn["target"]
    assert (before[:, 0] == dictionary.eos()).all()
    assert torch.equal(
        before[:, 1:][before[:, 1:] != dictionary.pad()],
        target[(target != dictionary.pad()) & (target != dictionary.eos())],
    )
    assert drawn["ntokens"] == int((target != dictionary.pad()).sum())
    model.eval()
    model.training = True  # without dropout
    criterion._own_sentences = lambda *_: drawn
    loss, _, log = criterion(model, sample)
    student, teacher = (z(**drawn["net_input"])[0] for z in (model, criterion.teacher.models[0]))
    means = divergence(student, teacher, "reverse")[target != dictionary.pad()].mean()
    assert loss.item() == pytest.approx(sample["ntokens"] * means.item(), rel=1e-5)
    assert log["kd_divergence"].item() == pytest.approx(loss.item())
    criterion.teacher.models = [model]  # which has nothing to correct in itself
    assert abs(criterion(model, sample)[0].item()) < 1e-3


def test_the_teacher_is_not_asked_when_the_schedule_takes_its_share(make):
    task, criterion = make(label_smoothing=0.1, smoothing_convention="uniform")
    criterion.train()
    sample = batch_of(task)
    student = Logits(torch.randn(*sample["target"].shape, len(task.target_dictionary)))
    task.kd_weights = {"": 1e-12}
    asked, _, _ = criterion(student, sample)
    task.kd_weights = {"": 0.0}
    criterion.teacher = None  # whoever asks it fails
    loss, _, log = criterion(student, sample)
    assert float(loss) == pytest.approx(float(asked), rel=1e-6)
    numbers = logged(criterion, log)
    assert numbers["kd_weight"] == 0
    assert numbers["kd_hard_ce"] == pytest.approx(numbers["loss"], abs=1e-3)
    assert math.isnan(numbers["kd_ce"])


def test_stored_values_stay_float32_for_a_student_in_half_precision(make, store):
    """fairseq's trainer casts what is float32 in a batch."""
    task, criterion = make()
    task.soft_labels = labels = SoftLabels(store)
    pairs = SoftLabelledPairs(task.dataset("train"), labels)
    batch = pairs.collater([pairs[index] for index in range(4)])
    sample = utils.apply_to_sample(
        lambda part: part.bfloat16() if part.dtype is torch.float32 else part, batch
    )
    taught = criterion._teacher_of(sample, torch.zeros(1, dtype=torch.bfloat16))
    assert taught.values.dtype is torch.float32
    row = sample["id"].tolist().index(0)
    own = labels[0].values
    assert torch.equal(taught.values[row, : len(own)], torch.from_numpy(own.astype("float32")))
