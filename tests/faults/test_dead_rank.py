"""A process of several that is killed: the others end within a minute, each with one line that names it."""

import json
import shlex
from importlib.util import find_spec
from pathlib import Path

import pytest

import forked
from faults import test_kills
from faults.test_full_disk import note
from faults.test_kills import OF_FAIRSEQ, OF_MMCLS, OF_TIMM, TIMM, fairseq_words

pytestmark = pytest.mark.integration
digits, teacher, numbers, recipe = (
    getattr(test_kills, name) for name in ("digits", "teacher", "numbers", "recipe")
)
OF_SEVERAL = (
    "distributed_training.distributed_world_size=2",
    "distributed_training.distributed_rank={rank}",
    "distributed_training.distributed_init_method='tcp://127.0.0.1:{port}'",
    "distributed_training.distributed_no_spawn=true",
    "distributed_training.distributed_backend=gloo",
    "distributed_training.ddp_backend=legacy_ddp",
)


@pytest.mark.parametrize("victim", [0, 1])
@pytest.mark.parametrize("kind", ["fairseq", "mmcls", "lskd stability", "timm train.py"])
def test_the_others_end_within_a_minute(kind, victim, request, tmp_path):
    """Rank 0 has the store that all meet by, as it has without torchrun."""
    if not request.config.getoption("--long"):
        pytest.skip("in make faults alone; that the line is said is tried in the tests of the trainers")
    given = request.getfixturevalue
    if kind == "fairseq":
        imported, words = OF_FAIRSEQ, fairseq_words("teacher", given("numbers") / "bin", *OF_SEVERAL)
        says = "begin training epoch 2"
    elif kind == "mmcls":
        script = Path(find_spec("mmcls").origin).parent / ".mim" / "tools" / "train.py"
        imported, words = OF_MMCLS, [script, given("recipe"), "--work-dir", "out", "--launcher", "pytorch"]
        says = "Epoch(val) [1]"
    elif kind == "timm train.py":
        imported, words = OF_TIMM, ["-m", "timm_ls_kd", "train.py", given("digits"), *TIMM]
        words += ["--kd-teacher-checkpoint", given("teacher")]
        says = "epoch 0 done"
    else:
        imported, asked = OF_TIMM, ["--model", "test_resnet", "--checkpoint", given("teacher")]
        where = [
            "--data-dir",
            given("digits"),
            *shlex.split("--img-size 32 --batch-size 1 --workers 0 --device cpu"),
        ]
        words = ["-m", "lskd_study", "stability", *asked, *asked, "--name", "one", "--name", "two", *where]
        says = "images in"
    (tmp_path / "said").mkdir()
    started = [Path(__file__).with_name("ranks.py"), 2, victim, says, tmp_path / "said", *words]
    done = forked.run(*started, imported=imported, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    ends = json.loads(done.stdout)
    assert ends[str(victim)][0] == -9
    status, seconds = ends[str(1 - victim)]
    said = (tmp_path / "said" / str(1 - victim)).read_text()
    assert status == 2, said
    assert seconds < 60
    assert "Traceback" not in said
    (line,) = [line for line in said.splitlines() if ": error: " in line]
    assert f"rank {victim} of this run has " in line
    print(f"{kind}, rank {victim}: {line}, {seconds:.1f} s later", flush=True)
    names = {"fairseq": "fairseq-hydra-train", "mmcls": "mmcls' tools/train.py --launcher pytorch"}
    expected = "the other ends within 60 s, with one line that names the rank, and status 2"
    note(f"rank {victim} killed", names.get(kind, kind), expected, 1)
