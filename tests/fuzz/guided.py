"""The readers of `targets.py` under inputs that coverage guides: atheris, where it is installed.

python tests/fuzz/guided.py [--seconds 60] [TARGET ...]

A new input is kept where it reaches branches of ours that none before it reached. A target ends at its first
failure: another exception than an `LskdError`, a crash, a hang, more than 8 GiB of memory. What failed is in
${TMPDIR:-/tmp}/lskd-fuzz, the counts are in docs/reliability/fuzz_guided.csv.
"""

import argparse
import contextlib
import csv
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).resolve()
TABLE = HERE.parents[2] / "docs" / "reliability" / "fuzz_guided.csv"
COLUMNS = ("target", "inputs", "reached", "failures", "seconds")
OURS = ["lskd", "lskd_study", "timm_ls_kd", "fairseq_kd", "mmcls_bnn"]
KEPT = Path(tempfile.gettempdir(), "lskd-fuzz")


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("targets", nargs="*", metavar="TARGET", help="their names (default: all)")
    parser.add_argument("--seconds", type=int, default=60, help="for each target")
    parser.add_argument("--seed", type=int, default=18)
    parser.add_argument("--inside", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    sys.path.insert(0, str(HERE.parents[1]))
    if args.inside:
        fuzz(args.targets[0], args.seconds, args.seed, args.inside)
    from fuzz.targets import TARGETS

    names = [target.name for target in TARGETS]
    if unknown := set(args.targets) - set(names):
        parser.error(f"unknown: {', '.join(sorted(unknown))}; known: {', '.join(names)}")
    rows = {}
    if TABLE.exists():
        with TABLE.open(newline="") as file:
            rows = {row["target"]: row for row in csv.DictReader(file)}
    failed = 0
    for name in args.targets or names:
        begun = time.monotonic()
        words = [sys.executable, str(HERE), name, "--seconds", str(args.seconds), "--seed", str(args.seed)]
        with tempfile.TemporaryDirectory() as work:  # atheris never returns to remove it
            done = subprocess.run(
                [*words, "--inside", work],
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
                errors="replace",
                check=False,
            )
        if "No module named 'atheris'" in done.stderr:
            sys.exit("atheris is not installed: pip install atheris")
        inputs, reached = _last(r"^#(\d+)\s", done.stderr), _last(r"\bcov: (\d+)", done.stderr)
        if done.returncode:
            failed += 1
            print(done.stderr[-3000:])
        numbers = (inputs, reached, int(done.returncode != 0), round(time.monotonic() - begun))
        rows[name] = dict(zip(COLUMNS, (name, *map(str, numbers)), strict=True))
        print(rows[name], flush=True)
        with TABLE.open("w", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
            writer.writeheader()
            writer.writerows(sorted(rows.values(), key=lambda row: row["target"]))
    return 1 if failed else 0


def _last(pattern: str, text: str) -> int:
    return int(([*re.findall(pattern, text, re.MULTILINE)] or ["0"])[-1])


def fuzz(name: str, seconds: int, seed: int, work: Path) -> None:
    """Give a target inputs for so long, in a folder that is empty; this process ends with it."""
    import atheris

    with atheris.instrument_imports(include=OURS):
        from fuzz.targets import TARGETS
        from lskd import LskdError

        target = next(target for target in TARGETS if target.name == name)
        folder, corpus = work / "folder", work / "corpus"
        folder.mkdir()
        corpus.mkdir()
        sound, read = target.prepare(folder)
        for number, data in enumerate(sound):
            (corpus / str(number)).write_bytes(data)
            with contextlib.suppress(LskdError):  # what it imports is instrumented, too
                read(data)

        def one(data: bytes) -> None:
            with contextlib.suppress(LskdError):
                read(data)

        KEPT.mkdir(exist_ok=True)
        limits = [f"-max_total_time={seconds}", f"-timeout={round(3 * target.seconds)}", f"-seed={seed}"]
        limits += ["-rss_limit_mb=8192", "-max_len=65536", f"-artifact_prefix={KEPT}/guided-"]
        atheris.Setup([sys.argv[0], *limits, str(corpus)], one, internal_libfuzzer=True)
        atheris.Fuzz()


if __name__ == "__main__":
    sys.exit(main())
