"""Tar archives: what is read, and what is refused in one line that says why."""

import io
import tarfile

import pytest

from fuzz import attacks
from lskd import LskdError
from lskd_study.data.folders.archives import MEMBER_LIMIT, read_members

pytestmark = pytest.mark.unit


@pytest.mark.parametrize(
    "headers",
    [
        attacks.pax({"SCHILY.xattr.com.apple.ResourceFork": "x" * 70_000}),
        attacks.pax({"comment": "x"}, tarfile.XGLTYPE) + attacks.pax({"path": "p" * 70_000}),
        attacks.pax({"size": "03"}),
    ],
)
def test_headers_that_are_sound(tmp_path, headers):
    file = tmp_path / "x.tar"
    file.write_bytes((headers + attacks.header("x", 3) + b"abc" + bytes(509)) * 40 + bytes(1024))
    assert [member.read() for member in read_members(file)] == [b"abc"] * 40


def test_what_is_sound_and_not_read_is_called_by_its_name(tmp_path):
    file = tmp_path / "x.tar"
    odd = [(r"sparse files \(tar's --sparse, -S\)", data) for _, data in attacks.sparse_tars()]
    large = attacks.pax({"SCHILY.xattr.x": "x" * 70_000})
    for words, data in (*odd, ("extended attributes of more than 128 kB", large * 2)):
        for before in (b"", attacks.header("first", 0)):
            file.write_bytes(before + data + attacks.header("x", 0))
            with pytest.raises(LskdError, match=rf"x\.tar has {words}; pack it again, without them"):
                list(read_members(file))


def test_a_member_is_no_larger_than_it_can_be(tmp_path):
    """A few kB in gzip that become more than 128 MB of text."""
    file = tmp_path / "x.tgz"
    with tarfile.open(file, "w:gz") as tar:
        member = tarfile.TarInfo("images.txt")
        member.size = MEMBER_LIMIT + 1
        tar.addfile(member, Zeros())
    with pytest.raises(LskdError, match=r"images.txt has 134,217,729 bytes"):
        next(read_members(file)).read()
    assert file.stat().st_size < 1 << 20


class Zeros(io.RawIOBase):
    def read(self, size: int = -1) -> bytes:
        return bytes(size)
