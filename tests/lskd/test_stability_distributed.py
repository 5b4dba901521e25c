"""Two and three processes with gloo give what one process gives, however the samples are dealt out."""

import contextlib
import json
import os
import signal
import subprocess
import sys

import pytest
import torch

from lskd import Stability

pytestmark = pytest.mark.integration

DEFINITIONS = ("target_std", "vector_l2", "between_vector_l2", "between_target_std")
# Rows of each rank; a rank with None never calls update.
DEALS = {
    "even": (range(0, 60, 2), range(1, 60, 2)),
    "uneven": (range(11), range(11, 60)),
    "one sample": (range(59), range(59, 60)),
    "empty batch": (range(60), range(0)),
    "never updated": (range(60), None),
    "never updated, first": (None, range(60)),
    "three": (range(0, 60, 3), range(1, 60, 3), range(2, 60, 3)),
    "three, uneven": (range(7), None, range(7, 60)),
}

WORKER = """
import json, os, sys, warnings
import torch
from lskd import Stability

folder, deals = sys.argv[1], json.loads(sys.argv[2])
world_size = len(deals[0][2])
children = []
for rank in range(world_size):  # each forked from one that has imported everything
    children.append(os.fork())
    if children[-1] == 0:
        break
else:
    statuses = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    sys.exit(f"the ranks ended with {statuses}" if any(statuses) else None)
sys.stdout, sys.stderr = (open(f"{folder}/{name}{world_size}-{rank}", "w") for name in ("out", "err"))
warnings.simplefilter("ignore")
init = f"file://{folder}/init{world_size}"
torch.distributed.init_process_group("gloo", init_method=init, rank=rank, world_size=world_size)
saved = torch.load(f"{folder}/samples.pt")
logits, labels = saved["logits"], saved["labels"]
for name, definition, rows in deals:
    metric = Stability(int(logits.shape[1]), definition)
    if rows[rank] is not None:
        for some in torch.tensor(rows[rank], dtype=torch.long).split(9):
            metric.update(logits[some], labels[some])
    before = metric.counts.tolist()
    result = everywhere = error = None
    try:
        result = float(metric.compute())
        with metric.sync_context():
            everywhere = metric.counts.tolist()
    except Exception as caught:
        error = repr(caught)
    line = [name, definition, result, error, everywhere, before == metric.counts.tolist()]
    print(json.dumps(line), flush=True)
torch.distributed.destroy_process_group()
"""


def samples():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(60, 4, generator=generator) * 2
    labels = torch.randint(3, (60,), generator=generator).sort().values  # so that a rank can lack a class
    labels[-1] = 3  # one sample, seen by one rank
    return logits, labels


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gloo")
    logits, labels = samples()
    torch.save({"logits": logits, "labels": labels}, folder / "samples.pt")
    return run_workers(folder, 2) | run_workers(folder, 3)


def run_workers(folder, world_size):
    deals = [
        (name, definition, [None if rows is None else list(rows) for rows in ranks])
        for name, ranks in DEALS.items()
        for definition in DEFINITIONS
        if len(ranks) == world_size
    ]
    # What exchanges lists comes last: a collective that goes wrong takes its processes with it.
    deals.sort(key=lambda deal: deal[1] == "vector_l2")
    words = [sys.executable, "-c", WORKER, str(folder), json.dumps(deals)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(words, env=environment, start_new_session=True) as group:
        try:
            status = group.wait(timeout=300)
        except subprocess.TimeoutExpired:
            status = "hung and was killed"
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(group.pid, signal.SIGKILL)
    found: dict = {("status", world_size): status}
    for rank in range(world_size):
        output, errors = ((folder / f"{name}{world_size}-{rank}").read_text() for name in ("out", "err"))
        for line in output.splitlines():
            name, definition, *rest = json.loads(line)
            found[name, definition, rank] = rest
        found["errors", world_size, rank] = errors[-2000:]
    return found


@pytest.mark.parametrize("definition", DEFINITIONS)
@pytest.mark.parametrize(
    ("deal", "rank"), [(name, rank) for name, ranks in DEALS.items() for rank in range(len(ranks))]
)
@pytest.mark.filterwarnings("ignore:stability leaves out:UserWarning")
def test_several_processes_are_one(outcomes, deal, definition, rank):
    assert (deal, definition, rank) in outcomes, outcomes["errors", len(DEALS[deal]), rank]
    result, error, everywhere, restored = outcomes[deal, definition, rank]
    assert error is None
    logits, labels = samples()
    assert result == pytest.approx(float(Stability(4, definition)(logits, labels)), abs=1e-7)
    assert everywhere == labels.bincount(minlength=4).tolist()
    assert restored  # after the exchange a rank goes on with its own samples


@pytest.mark.parametrize("world_size", [2, 3])
def test_all_processes_end_by_themselves(outcomes, world_size):
    assert outcomes["status", world_size] == 0, outcomes["errors", world_size, 0]


def test_moments_of_three_ranks_are_one_pass():
    """Reduction over more than two ranks, one of them empty, as torchmetrics hands the states over."""
    logits, labels = samples()
    parts = [slice(0, 20), slice(20, 20), slice(20, 60)]
    metrics = [Stability(4) for _ in parts]
    for metric, part in zip(metrics, parts, strict=True):
        metric.update(logits[part], labels[part])
    whole = Stability(4)
    whole.update(logits, labels)
    reduce = whole._reductions["moments"]
    torch.testing.assert_close(reduce(torch.stack([metric.moments for metric in metrics])), whole.moments)
