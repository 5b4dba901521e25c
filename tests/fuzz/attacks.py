"""Files and names made to run code, to fill the memory or to mislead; each is made here, none is stored."""

import gzip
import io
import json
import lzma
import pickle
import shlex
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from typing import Any

# Names that a page, a table, a figure or a terminal would take for more than names.
NAMES = (
    "<img src=x>",
    "<script>document.title = 1</script>",
    "'\"><b onmouseover=x>",
    "{{ 7 * 7 }}",
    "=HYPERLINK(1)",
    "+cmd|' /C calc'!A0",
    "@SUM(1)",
    "-2+3",
    "\t=1",
    "$\\frac$",
    "$x^{2$",
    "a|b\nc",
    "\x1b]0;owned\x07",
    "\u202egnp.exe",
)


# YAML and JSON


def yamls() -> Iterator[tuple[str, bytes]]:
    """Texts that are small and become much, or that name what would run."""
    aliases = "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 10))
    yield "aliases of aliases", f"a0: &a0 [x]\n{aliases}".encode()
    merged = "".join(f"a{i}: &a{i} {{<<: [{', '.join([f'*a{i - 1}'] * 9)}]}}\n" for i in range(1, 10))
    yield "merges of merges", f"a0: &a0 {{x: 1}}\n{merged}".encode()
    yield "an alias of itself", b"a: &a [*a]\n"
    yield "a merge of itself", b"a: &a {<<: *a}\n"
    yield "lists in lists", b"[" * 100_000
    yield "mappings in mappings", b"".join(b" " * i + b"a:\n" for i in range(1000))
    yield "keys in keys", b"? " * 20_000
    yield "a number of a million digits", b"a: " + b"9" * 1_000_000
    yield "a number to base 60", b"a: " + b"1:" * 300_000 + b"1"
    yield "a number in hexadecimal", b"a: 0x" + b"f" * 900_000
    yield "a float of many digits", b"a: 1." + b"0" * 900_000 + b"e+1"
    yield "a Python object", b"a: !!python/object/apply:os.system [x]\n"
    yield "a Python name", b"a: !!python/name:os.system\n"
    yield "two million bytes", b"#" * 2_000_000
    yield "half a surrogate pair", b'a: "\\ud800"\n'
    yield "an unhashable key", b"? [a]\n: 1\n"
    yield "a date that is none", b"a: 2024-13-45\n"
    yield "no UTF-8", b"a: \xff\n"
    yield "NUL", b"a: \0\n"
    yield "a binary", b"a: !!binary ====\n"
    yield "an odd set", b"a: !!set [1]\n"
    yield "an odd order", b"a: !!omap {a: 1}\n"


def jsons() -> Iterator[tuple[str, bytes]]:
    yield "lists in lists", b"[" * 1_000_000
    yield "objects in objects", b'{"a":' * 200_000
    yield "a number of a million digits", b"9" * 1_000_000
    yield "a number too large", b"[1e999]"
    yield "no number", b"[NaN]"
    yield "half a surrogate pair", b'["\\ud800"]'
    yield "no UTF-8", b'["\xff"]'
    yield "two", b"{} {}"


# Archives


def header(
    name: str, size: int, kind: bytes = tarfile.REGTYPE, change: Callable[[bytearray], None] | None = None
) -> bytes:
    """Return a tar header of any size, negative ones in the base-256 notation."""
    member = tarfile.TarInfo(name)
    member.type = kind
    block = bytearray(member.tobuf(tarfile.GNU_FORMAT))
    block[124:136] = (b"\xff" if size < 0 else b"\x80") + size.to_bytes(11, "big", signed=True)
    if change is not None:
        change(block)
    block[148:156] = b"%06o\0 " % (sum(block[:148]) + 256 + sum(block[156:]))
    return bytes(block)


def pax(records: dict[str, str], kind: bytes = tarfile.XHDTYPE) -> bytes:
    """Return an extended header."""
    text = b""
    for key, value in records.items():
        length = len(key) + len(value) + 3
        length += len(str(length + len(str(length))))
        text += f"{length} {key}={value}\n".encode()
    return header("p", len(text), kind) + text + bytes(-len(text) % 512)


def damaged_tars() -> Iterator[tuple[str, bytes]]:
    """Tar archives that lie about themselves: none is read to its end."""
    first = header("first", 0)
    yield "a negative size", first + header("x", -512)
    yield "a negative size further back", first + header("x", 512) + bytes(512) + header("y", -1024)
    yield "a negative size in an extended header", first + pax({"size": "-1024"}) + header("x", 0)
    yield "an extended header of 2 GB", first + header("x", 1 << 31, tarfile.XHDTYPE) + bytes(1 << 21)
    yield "a long name of negative size", first + header("x", -512, tarfile.GNUTYPE_LONGNAME) + bytes(1 << 21)
    yield "a size of thousands of digits", first + pax({"size": "9" * 5000}) + header("x", 0)
    yield "headers upon headers", first + pax({"comment": "x"}) * 3000 + header("x", 0)
    yield "names upon names", first + (header("x", 512, tarfile.GNUTYPE_LONGNAME) + bytes(512)) * 3000
    many = {f"{number:05d}": "x" for number in range(4000)}
    whole = b"".join(pax({f"{i}-{key}": "x" for key in many}, tarfile.XGLTYPE) for i in range(200))
    yield "keys for all members", first + whole + header("x", 0)
    yield "a damaged end of xz", lzma.compress(first + bytes(1024))[:-40] + bytes(40)
    yield from sparse_tars()


def sparse_tars() -> Iterator[tuple[str, bytes]]:
    """Maps of sparse files, which tarfile reads whole, however long."""
    extended = struct.pack("12s12s", b"0" * 11, b"0" * 11) * 21 + b"\1" + bytes(7)

    def goes_on(block: bytearray) -> None:
        block[482] = 1

    yield "a map of GNU's old form", header("x", 0, tarfile.GNUTYPE_SPARSE, goes_on) + extended * 40_000
    count = 1_500_000
    version = {
        "GNU.sparse.major": "1",
        "GNU.sparse.minor": "0",
        "GNU.sparse.realsize": "1",
        "GNU.sparse.name": "x",
    }
    text = f"{count}\n".encode() + b"0\n" * 2 * count
    text += bytes(-len(text) % 512)
    yield "a map in the data", pax(version) + header("x", len(text)) + text
    numbers = ",".join("0" * 60_000)
    yield "a map in the header", pax({"GNU.sparse.map": numbers, "GNU.sparse.size": "1"}) + header("x", 0)


def leading_out() -> Iterator[tuple[str, bytes]]:
    """Members that would lie elsewhere, or be something else."""
    for name in ("../x", "/x", "a/../../x", "//x", ".//x", "a/../b/x", "a/" * 8 + "../" * 9 + "x"):
        yield f"a file {name[:12]}", header(name, 0)
    for kind, what in ((tarfile.SYMTYPE, "symbolic"), (tarfile.LNKTYPE, "hard")):
        link = tarfile.TarInfo("link")
        link.type, link.linkname = kind, "../../etc/passwd"
        yield f"a {what} link and a file behind it", link.tobuf() + header("link/x", 0)
    for kind, what in (
        (tarfile.CHRTYPE, "character"),
        (tarfile.BLKTYPE, "block"),
        (tarfile.FIFOTYPE, "pipe"),
    ):
        yield f"a device ({what})", header("device", 0, kind)


def packed_zeros(size: int) -> bytes:
    """Return a gzip file of so many zeros."""
    content = io.BytesIO()
    with gzip.open(content, "wb", 9) as file:
        for _ in range(size >> 20):
            file.write(bytes(1 << 20))
    return content.getvalue()


def zip_of(members: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> bytes:
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w", compression) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return content.getvalue()


def overlapping_zip(names: list[str], data: bytes) -> bytes:
    """Return an archive whose directory has many names for the same bytes."""
    packed = zlib.compressobj(9, zlib.DEFLATED, -15)
    stored = packed.compress(data) + packed.flush()
    sizes = struct.pack("<III", zlib.crc32(data), len(stored), len(data))
    common = struct.pack("<HHHHH", 20, 0, 8, 0, 0x21)
    local = b"PK\3\4" + common + sizes + struct.pack("<HH", len(names[0]), 0) + names[0].encode() + stored
    directory = b"".join(
        b"PK\1\2" + struct.pack("<H", 20) + common + sizes
        + struct.pack("<HHHHHII", len(name), 0, 0, 0, 0, 0, 0) + name.encode()
        for name in names
    )  # fmt: skip
    end = struct.pack("<HHHHIIH", 0, 0, len(names), len(names), len(directory), len(local), 0)
    return local + directory + b"PK\5\6" + end


# Pickles


# Opcodes that only build, so that no family is missing: each leaves one value.
VALUES = {
    "numbers": b"(I1\nI01\nL1L\nF1.5\nJ\1\0\0\0K\1M\1\0\x8a\1\1\x8b\1\0\0\0\1G" + bytes(8) + b"\x88\x89Nt",
    "texts": b"(Va\nX\1\0\0\0a\x8c\1a\x8d\1\0\0\0\0\0\0\0at",
    "bytes": b"(S'a'\nT\1\0\0\0aU\1aB\1\0\0\0aC\1a\x8e\1\0\0\0\0\0\0\0a\x96\1\0\0\0\0\0\0\0at",
    "tuples": b"()N\x85NN\x86NNN\x87t",
    "lists": b"((Nl]Na](Net",
    "mappings": b"((NNd}NNs}(NNut",
    "sets": b"\x80\4(\x8f(N\x90(N\x91t",
    "a memo": b"\x80\4\x95\0\0\0\0\0\0\0\0(Np0\nq\1r\2\0\0\0\x94g0\nh\1j\2\0\0\0N2(1t",
}


def pickles(trap: str) -> Iterator[tuple[str, bytes]]:
    """With every opcode; those that call would make the file ``trap``."""
    # In text pickles have Latin-1, and other letters as \u and four digits.
    touch = f"touch {shlex.quote(trap)}\n".encode("raw_unicode_escape")
    call = b"cos\nsystem\n(V" + touch + b"tR."
    code = f"open({trap!a}, 'w')"
    yield "GLOBAL REDUCE", b"\x80\x02" + call
    yield "STACK_GLOBAL", b"\x80\x04\x8c\x02os\x8c\x06system\x93(V" + touch + b"tR."
    yield "INST", b"(V" + touch + b"ios\nsystem\n."
    yield "OBJ", b"(cos\nsystem\nV" + touch + b"o."
    yield "NEWOBJ", f"\x80\x02cbuiltins\neval\n(V{code}\nt\x81.".encode("latin-1")
    yield "NEWOBJ_EX", f"\x80\x04cbuiltins\neval\n(V{code}\nt}}\x92.".encode("latin-1")
    yield (
        "BUILD",
        f"\x80\x02ctypes\nSimpleNamespace\n)R}}(V__class__\ncbuiltins\neval\nub0V{code}\n.".encode("latin-1"),
    )
    yield "EXT1", b"\x80\x02\x82\x01)R."
    yield "EXT2", b"\x80\x02\x83\x01\0)R."
    yield "EXT4", b"\x80\x02\x84\x01\0\0\0)R."
    yield "PERSID", b"Ppersistent\n."
    yield "BINPERSID", b"\x80\x02(V" + b"storage\ncbuiltins\neval\nV0\nVcpu\nI1\ntQ."
    for what, value in VALUES.items():
        yield f"{what} before a call", value + b"0" + call
    yield "buffers elsewhere", b"\x80\x05\x97\x980" + call
    of_path = b"cbuiltins\ngetattr\n(cbuiltins\ngetattr\n(cos\npath\nVos\ntRVsystem\ntR"
    yield "a getattr chain", of_path + b"(V" + touch + b"tR."
    yield "torch's own eval", f"ctorch.jit\n_unwrap_optional\n(V{code}\ntR.".encode()
    yield "a codec", b"c_codecs\nencode\n(Va\nVlat2n1\ntR."
    lists = b"\x80\x02]q\0" + b"".join(
        b"]q" + bytes([i + 1]) + b"(" + (b"h" + bytes([i])) * 9 + b"e" for i in range(60)
    )
    yield "lists of lists of lists", lists + b"."
    yield "marks", b"(" * 1_000_000 + b"."
    yield "tuples in tuples", b"\x80\x02)" + b"\x85" * 200_000 + b"."
    yield "a long number", b"\x80\x02\x8b" + struct.pack("<i", (1 << 31) - 1) + b"\1"
    yield "a negative length", b"\x80\x02\x8b" + struct.pack("<i", -1) + b"."
    yield "a long text", b"\x80\x04\x8d" + struct.pack("<Q", 1 << 40) + b"a"
    yield "long bytes", b"\x80\x04\x8e" + struct.pack("<Q", 1 << 62) + b"a"
    yield "a byte array", b"\x80\x05\x96" + struct.pack("<Q", 1 << 40) + b"a"
    yield "a frame", b"\x80\x04\x95" + struct.pack("<Q", 1 << 62) + b"N."
    yield "a memo far away", b"\x80\x02Nr\xff\xff\xff\x7f."
    yield "a number in text", b"I" + b"9" * 100_000 + b"\n."
    yield "an empty stack", b"."
    yield "a protocol to come", b"\x80\xff."


def checkpoints(trap: str) -> Iterator[tuple[str, bytes]]:
    """Each pickle in each of torch's containers, and containers that lie."""
    legacy = pickle.dumps(0x1950A86A20F9469CFC6C, 2) + pickle.dumps(1001, 2)
    legacy += pickle.dumps({"protocol_version": 1001, "little_endian": True, "type_sizes": {}}, 2)
    for name, data in pickles(trap):
        yield f"{name}, alone", data
        yield (
            f"{name}, in a zip file",
            zip_of({"a/data.pkl": data, "a/version": b"3\n", "a/byteorder": b"little"}),
        )
        yield f"{name}, as before zip files", legacy + data + pickle.dumps([], 2)
    for numel, size in (((1 << 40), (1 << 40,)), (4, (1 << 40,)), (-1, (1,)), (4, (-1,))):
        tensor = _tensor(numel, size)
        yield (
            f"a tensor of {size} in {numel}",
            zip_of(
                {"a/data.pkl": tensor, "a/data/0": bytes(16), "a/version": b"3\n", "a/byteorder": b"little"}
            ),
        )
        yield (
            f"a tensor of {size} in {numel}, as before",
            legacy + tensor + pickle.dumps(["0"], 2) + struct.pack("<q", numel),
        )
    split = zip_of({"a/data.pkl": pickle.dumps({})})
    disks = struct.pack("<4sIQI4sHHHHIIH", b"PK\6\7", 0, 0, 9, b"PK\5\6", 0, 0, 1, 1, 40, len(split) - 62, 0)
    yield "a zip file over nine disks", split[:-22] + disks
    bomb = zip_of({"a/data.pkl": bytes(1 << 28), "a/version": b"3\n"}, zipfile.ZIP_DEFLATED)
    yield "a zip bomb", bomb
    entry = bomb.index(b"PK\x01\x02")  # of the list at the end; Python's reader refuses what torch's reads
    for name, at, value in (("version", 6, b"\x63"), ("flags", 8, b"\x01"), ("UTF-8", 9, b"\x08")):
        changed = bytearray(bomb)
        changed[entry + at : entry + at + 1] = value
        if name == "UTF-8":
            changed[entry + 46 : entry + 47] = b"\xff"
        yield f"a zip bomb with another {name}", bytes(changed)
    yield (
        "overlapping entries",
        overlapping_zip(["a/data.pkl", *(f"a/data/{i}" for i in range(2000))], bytes(1 << 20)),
    )


def _tensor(numel: int, size: tuple[int, ...]) -> bytes:
    def number(value: int) -> bytes:
        return f"L{value}L\n".encode()

    storage = b"(Vstorage\nctorch\nFloatStorage\nV0\nVcpu\n" + number(numel) + b"tQ"
    shape = b"(" + b"".join(map(number, size)) + b"t"
    rebuilt = b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + number(0) + shape + b"(I1\nt"
    return b"\x80\x02}Vw\n" + rebuilt + b"I00\nccollections\nOrderedDict\n)RtRs."


# Settings that fairseq evaluates


def fairseq_settings(code: str) -> Iterator[tuple[str, dict[str, dict[str, Any]], bool]]:
    """Yield settings by section for each way of fairseq from a string to Python.

    The last says whether one flat namespace, as old fairseq stored it, can have them too.
    """
    attention = {"encoder_attention": code, "decoder_attention": code}
    layers = {"encoder_layers": code, "decoder_layers": code}
    for name, settings in {
        "fconv": layers,
        "fconv_self_att": layers | attention | {"pretrained": code},
        "fconv_lm": layers,
        "lightconv_lm": {"adaptive_softmax_cutoff": code, "criterion": "adaptive_loss"},
        "transformer_lm": {"adaptive_softmax_cutoff": code, "criterion": "adaptive_loss"},
        "wav2vec": {"conv_feature_layers": code, "conv_aggregator_layers": code},
        "wav2vec2": {"conv_feature_layers": code},
        "hubert": {"conv_feature_layers": code},
        "transformer": {"adaptive_softmax_cutoff": code},
        "transformer_iwslt_de_en": {"encoder_xformers_att_config": code},
        "lstm": {"decoder_attention": code},
        "lightconv": {"adaptive_softmax_cutoff": code},
        "mbart_large": {"adaptive_softmax_cutoff": code},
    }.items():
        yield name, {"model": {"arch": name, "_name": name} | settings}, True
    yield "bytes", {"model": {"arch": "lstm", "_name": "lstm", "decoder_attention": code.encode()}}, True
    yield "nested", {"model": {"_name": "transformer", "encoder": {"xformers_att_config": code}}}, False
    reference = {"_name": "transformer", "adaptive_softmax_cutoff": "${common.tensorboard_logdir}"}
    yield "reference", {"model": reference, "common": {"tensorboard_logdir": code}}, False
    yield "task", {"task": {"_name": "audio_pretraining", "data": "x", "post_save_script": code}}, False
    yield "language", {"task": {"source_lang": f"de; {code}"}}, False
    yield "detokeniser", {"task": {"eval_bleu_detok": "os.system"}}, False


def forged(sections: dict[str, dict[str, Any]], flat: bool, cfg: dict[str, Any]) -> None:
    """Change a checkpoint's settings so; a section that names a component of its own is replaced."""
    for section, settings in sections.items():
        if section == "model" and flat:
            vars(cfg["model"]).update(settings)
        else:
            cfg[section] = settings if "_name" in settings else cfg[section] | settings


# Logits


def npzs(trap: str) -> Iterator[tuple[str, bytes]]:
    """Archives of arrays whose headers lie, or whose content would run."""

    def array(descr: str, shape: str, content: bytes = bytes(64)) -> bytes:
        text = f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}}}".encode()
        text += b" " * (-(len(text) + 11) % 64) + b"\n"
        return b"\x93NUMPY\1\0" + struct.pack("<H", len(text)) + text + content

    good = array("'<f4'", "(2, 2)", bytes(16))
    labels = array("'<i8'", "(2,)", bytes(16))
    for name, other in {
        "objects": array("'|O'", "(2,)", next(iter(pickles(trap)))[1]),
        "a great shape": array("'<f4'", f"({10**9}, {10**6})"),
        "a great shape that wraps": array("'<f4'", f"({1 << 33}, {1 << 33})"),
        "a negative shape": array("'<f4'", "(-1, 2)"),
        "wide texts": array("'<U1000000000'", "(2,)"),
        "code in the header": array(f"open({trap!a}, 'w')", "(2,)"),
        "deep code in the header": array("(" * 5000 + ")" * 5000, "(2,)"),
        "a subarray": array("('<f4', (1000000, 1000000))", "(2,)"),
        "nothing wide": array("'|V0'", f"({1 << 40}, 2)", b""),
        "texts of no width": array("'<U0'", f"({1 << 40},)", b""),
    }.items():
        for part in ("logits", "labels", "keys"):
            members = {"logits.npy": good, "labels.npy": labels, f"{part}.npy": other}
            yield f"{name} as {part}", zip_of(members)
    many = [f"{part}.npy" for part in ("logits", "labels", "features", "weight", "keys", "class_names")]
    yield (
        "overlapping entries",
        overlapping_zip(many, array("'<f4'", f"({1 << 12}, {1 << 12})", bytes(1 << 26))),
    )
    big = array("'<f4'", f"({1 << 12}, {1 << 12})", bytes(1 << 26))
    yield "a zip bomb", zip_of({"logits.npy": big, "labels.npy": labels}, zipfile.ZIP_DEFLATED)


def safetensors() -> Iterator[tuple[str, bytes]]:
    """Files whose headers lie."""

    def file(content: Any, data: bytes = bytes(64), length: int | None = None) -> bytes:
        text = content if isinstance(content, bytes) else json.dumps(content).encode()
        return struct.pack("<Q", len(text) if length is None else length) + text + data

    def of(**changes: Any) -> dict[str, Any]:
        labels = {"dtype": "I64", "shape": [2], "data_offsets": [16, 32]}
        logits = {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]}
        return {"logits": logits | changes, "labels": labels}

    yield "a header of 16 EB", file({}, length=(1 << 64) - 1)
    yield "a header of 100 MB", file({}, length=100 << 20)
    yield "no JSON", file(b"{" * 10_000)
    yield "lists in lists", file(b"[" * 100_000 + b"]" * 100_000)
    yield "a great shape", file(of(shape=[1 << 40, 1 << 40]))
    yield "a shape that wraps", file(of(shape=[1 << 32, 1 << 32, 4]))
    yield "a negative shape", file(of(shape=[-2, -2]))
    yield "an unknown type", file(of(dtype="F9"))
    yield "offsets beyond the end", file(of(data_offsets=[0, 1 << 50]))
    yield "offsets backwards", file(of(data_offsets=[16, 0]))
    yield "overlapping tensors", file(of(data_offsets=[8, 24]))
    yield (
        "a name twice",
        file(b'{"logits":{"dtype":"F32","shape":[0],"data_offsets":[0,0]},' + json.dumps(of()).encode()[1:]),
    )
    yield "metadata of numbers", file(of() | {"__metadata__": {"a": 1}})


def parquets() -> Iterator[tuple[str, bytes]]:
    """Tables of which a few bytes would become gigabytes."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    def file(table: Any, **options: Any) -> bytes:
        content = io.BytesIO()
        pq.write_table(table, content, **options)
        return content.getvalue()

    width = 1 << 12
    row = pa.array([[0.0] * width], pa.list_(pa.float32()))
    alike = pa.DictionaryArray.from_arrays(pa.array([0] * 3000, pa.int32()), pa.array([0]))
    labels = pa.array([0] * 3000)
    rows = pa.chunked_array([row] * 3000)
    yield "rows of zeros", file(pa.table({"logits": rows, "labels": labels}), compression="zstd")
    long = pa.array(["x" * (1 << 16)] * 3000).dictionary_encode()
    small = pa.array([[0.0, 1.0]] * 3000, pa.list_(pa.float32()))
    yield (
        "one long key",
        file(pa.table({"logits": small, "labels": labels, "keys": long}), compression="zstd"),
    )
    yield "labels by a dictionary", file(pa.table({"logits": small, "labels": alike}))
    sound = file(pa.table({"logits": small, "labels": labels}), compression="NONE")
    for number in (b"\xff" * 9 + b"\1", b"\xfe\xff\xff\xff\x0f", b"\xff\xff\xff\x7f"):
        for at in (4, 6, 8, 10):  # the first page's header says how large it is
            yield f"a page of {number.hex()} at {at}", sound[:at] + number + sound[at + len(number) :]
    yield "a footer of 4 GB", sound[:-8] + b"\xff\xff\xff\xff" + sound[-4:]
