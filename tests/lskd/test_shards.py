"""Shards that several jobs write: the merged store is that of one job, and what does not fit is refused."""

import shutil
from dataclasses import replace

import pytest

from lskd import SoftLabels, SoftLabelsError, SoftLabelsWriter
from lskd.soft_labels import store
from lskd.soft_labels.format import MANIFEST, shard_folder
from lskd.soft_labels.shards import merge_shards
from soft_label_stores import IDENTITY, assert_a_right_beginning, content, contents, in_a_fork, layout, write

pytestmark = [pytest.mark.unit, pytest.mark.usefixtures("small_blocks")]
WHOLE = layout(41, epochs=2)
LAYOUTS = (WHOLE, layout(41, rows_per_sample=1, seeds=True), layout(41, values="packed", num_classes=70_000))


def write_shard(path, whole, shard, stop=None, identity=IDENTITY):
    mine = replace(whole, shard=shard)
    with SoftLabelsWriter(shard_folder(path, shard), mine, identity) as writer:
        while writer.keys < (mine.keys if stop is None else stop):
            writer.append(*content(whole, mine.first + writer.keys))
    return shard_folder(path, shard)


@pytest.fixture
def shards(tmp_path):
    for number in (3, 1, 2):
        write_shard(tmp_path / "s", WHOLE, f"{number}/3")
    return tmp_path / "s"


@pytest.mark.parametrize("whole", LAYOUTS)
@pytest.mark.parametrize("count", [1, 4, 11])
def test_merged_shards_are_one_jobs_store_byte_for_byte(tmp_path, whole, count):
    for number in range(count, 0, -1):
        write_shard(tmp_path / "s", whole, f"{number}/{count}", stop=2)  # which is ended there
        write_shard(tmp_path / "s", whole, f"{number}/{count}")
    labels = merge_shards(tmp_path / "s")
    assert labels.complete
    assert contents(tmp_path / "s") == contents(write(tmp_path / "one", whole))
    assert len(assert_a_right_beginning(tmp_path / "s", whole, IDENTITY)) == whole.keys
    merge_shards(tmp_path / "s")
    assert contents(tmp_path / "s") == contents(tmp_path / "one")


def test_a_killed_merge_goes_on(shards, tmp_path, monkeypatch):
    monkeypatch.setattr(store, "_COPIED", 5)
    monkeypatch.setattr(store, "_COMMIT_SECONDS", 0.0)
    append = SoftLabelsWriter._append

    def dying(self, rows, counts):
        append(self, rows, counts)
        if self.keys > 40:
            store.os._exit(9)

    def work():
        monkeypatch.setattr(SoftLabelsWriter, "_append", dying)
        merge_shards(shards)

    assert in_a_fork(work) == 9
    assert 0 < len(assert_a_right_beginning(shards, WHOLE, IDENTITY)) < WHOLE.keys
    merge_shards(shards)
    assert contents(shards) == contents(write(tmp_path / "one", WHOLE))


def lack(shards):
    shutil.rmtree(shards / "shard-2-of-3")


def end_early(shards):
    lack(shards)
    write_shard(shards, WHOLE, "2/3", stop=3)


def twice(shards):
    shutil.copytree(shards / "shard-2-of-3", shards / "shard-2-of-3-of-host")


def of_other_count(shards):
    write_shard(shards, WHOLE, "2/2")


def of_other_identity(shards):
    lack(shards)
    write_shard(shards, WHOLE, "2/3", identity=IDENTITY | {"teacher": "another"})


def of_more(shards):
    lack(shards)
    write_shard(shards, WHOLE, "2/3", identity=IDENTITY | {"more": 1})


def of_other_layout(shards):
    lack(shards)
    write_shard(shards, replace(WHOLE, epochs=3), "2/3")


def damage(shards):
    rows = shards / "shard-3-of-3" / "rows.bin"
    content = bytearray(rows.read_bytes())
    content[-1] ^= 1
    rows.write_bytes(content)


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (lack, r"lacks 1 of 3 shards \(2\)"),
        (end_early, "shard-2-of-3 is unfinished: 3 of 27 keys"),
        (twice, r"shard-2-of-3-of-host \(shard 2/3\) overlaps with .*shard-2-of-3 "),
        (of_other_count, "overlaps"),
        (of_other_identity, "shard-2-of-3 do not belong to .*shard-1-of-3 beside them: teacher"),
        (of_more, "shard-1-of-3 do not belong to .*shard-2-of-3 beside them: more is unknown there"),
        (of_other_layout, r"layout.epochs is 3 there and 2 here"),
        (damage, "rows.bin is damaged in block"),
    ],
)
def test_shards_that_do_not_fit_are_refused_and_nothing_is_written(shards, harm, message):
    harm(shards)
    with pytest.raises(SoftLabelsError, match=message) as error:
        merge_shards(shards)
    assert "\n" not in str(error.value)
    assert {path.name.split("-")[0] for path in shards.iterdir()} == {"shard"}


def test_a_shard_is_no_store_and_a_store_no_place_for_shards(shards, tmp_path):
    with pytest.raises(SoftLabelsError, match="shard 2/3 of soft labels, not all of them"):
        SoftLabels(shards / "shard-2-of-3")
    with pytest.raises(SoftLabelsError, match=r"3 shard\(s\) .* not merged yet.* lskd soft-labels merge"):
        SoftLabels(shards)
    with pytest.raises(SoftLabelsError, match="not merged yet"):
        write(shards, WHOLE)
    assert not (shards / MANIFEST).exists()
    with pytest.raises(SoftLabelsError, match=r"layout.shard is 2/3 there and 2/4 here"):
        SoftLabelsWriter(shards / "shard-2-of-3", replace(WHOLE, shard="2/4"), IDENTITY)
    with pytest.raises(SoftLabelsError, match=r"layout.epochs is 2 there and 3 here"):
        write_shard(shards, replace(WHOLE, epochs=3), "2/3")
    merge_shards(shards)
    with pytest.raises(SoftLabelsError, match="not in shards"):
        write_shard(shards, WHOLE, "2/3")
    with pytest.raises(SoftLabelsError, match="has no shards"):
        merge_shards(write(tmp_path / "one", WHOLE))


@pytest.mark.parametrize("shard", ["0/3", "4/3", "1", "1/2/3", "-1/2", "1/10000", "a/b", "99/99"])
def test_shards_that_are_none(shard):
    with pytest.raises(SoftLabelsError, match=r"I/N|choose fewer"):
        replace(WHOLE, shard=shard)
