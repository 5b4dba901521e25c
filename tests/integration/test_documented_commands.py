"""Every command of README and docs, and docs/study.ipynb, on what `make demo` leaves, in small.

The notebook runs the digits recipe cut short; its results stand where those of `make demo` would. Each page's
blocks then run there, in the page's order, a command of several pages once. What is not run is in ``PARSED``,
with the reason, and goes through the command's own parser.
"""

import json
import re
import shutil
import subprocess
import sys
import textwrap
import tomllib
from functools import cache
from pathlib import Path

import nbformat
import pytest
import yaml

import forked
from lskd_study.plan.recipes import find_study_file
from lskd_study.runs.scheduler import check_snakemake_options
from parsed import parsed
from timm_ls_kd.trainer.arguments import parse_arguments

pytestmark = [pytest.mark.integration, pytest.mark.slow]

ROOT = Path(__file__).parents[2]
NOTEBOOK = ROOT / "docs" / "study.ipynb"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^ *```([^\n]*)\n(.*?)^ *```$", re.MULTILINE | re.DOTALL)
# Why a command is not run here, by what it begins with.
PARSED = {
    "make ": "installs everything, or trains or tests for minutes",
    "cp benchmarks/": "after `make bench-growth`",
    "pip install ": "installs",
    "fairseq-": "needs a data-bin and a teacher; tests/fairseq_kd and test_fairseq_study.py run these",
    "python -m fairseq_kd.": "the same",
    "lskd study recipes/number_words_de_en/study.yaml": "as test_fairseq_study.py does in small",
    "mim ": "trains for minutes; test_mmcls_commands.py runs these in small",
    "python -m mmcls_bnn.export ": "reads what mim trained; test_mmcls_commands.py runs it",
    "python -m mmcls_bnn.profile ": "reads what the command before wrote; test_mmcls_commands.py runs it",
    "python -m mmcls_bnn.authors ": "needs the authors' weights; mmcls_bnn/test_authors.py makes some",
    "python -m mmcls_bnn.soft_labels ": "needs ImageNet",
    "python -m torch.distributed.run ": "two processes of mmcls; test_mmcls_commands.py runs it",
    "python -c import mm": "part of the command that it stands in",
    "python /.mim/tools/train.py RECIPE ": "needs onedl-mmpretrain; test_mmpretrain.py runs it",
    "lskd study recipes/digits_bnn/study.yaml": "as test_mmcls_study.py does in small",
    "lskd stability --config ": "reads what mim trained; lskd_study/test_evaluate.py runs it",
    "torchrun ": "two processes; lskd_study/test_evaluate.py and test_timm_commands.py run these",
    "timm ~/": "needs a clone of timm, and wandb; timm_ls_kd/test_upstream.py refuses it without",
    "lskd study --own ": "measures for a minute and asks at a terminal; test_own.py runs it",
    "lskd study recipes/digits/study.yaml --output runs/decided": "trains long; test_planning.py runs it",
    "tensorboard ": "serves until it is ended; test_trainer.py reads what it would show",
    "timm train.py data/digits --model resnet18": "trains for minutes; test_trainer.py runs it",
    "lskd doctor": "imports every framework; lskd_study/test_cli.py runs it",
    "python benchmarks/translation_forms.py ": "trains for two hours",
    "lskd data imagenet ": "needs ImageNet",
    "lskd stability --list ": "needs ImageNet",
    "lskd figure class-count --study ": "needs studies on ImageNet",
    "lskd study recipes/imagenet/": "needs ImageNet and a cluster",
}
# A line of a block without a language that looks like a command.
COMMAND = r"^(\$ |(lskd|timm|mim|make|pip|python|fairseq-\w+) )"
ELSEWHERE = {"errata.md": "lskd_study/test_errata.py runs its blocks"}

# What the notebook is cut to here.
SHORTER = {"seeds=[0, 1, 2]": "seeds=[0]"}
# Imported once, and not by each command.
STUDY = ("timm", "lskd_study.pages.study", "lskd_study.study.engine", "lskd_study.cli.main")
OTHERS = ("mmcls.models", "mmcls.datasets", "timm", "fairseq_cli.train")
EXECUTE = """
import sys, nbformat
from nbclient import NotebookClient
book = nbformat.read(sys.argv[1], 4)
NotebookClient(book, kernel_name="python3").execute()
nbformat.write(book, sys.argv[2])
"""
FAIRSEQ = """
import json, sys
from fairseq import options
words = json.loads(sys.argv.pop())
parser = getattr(options, {"train": "get_training_parser", "validate": "get_validation_parser",
                           "generate": "get_generation_parser"}[words[0].partition("-")[2]])
sys.argv[1:] = words[1:]  # where fairseq looks for --user-dir
options.parse_args_and_arch(parser(), words[1:])
"""


def run(folder: Path, *words: object, imported: tuple[str, ...] = STUDY) -> str:
    done = forked.run(*words, imported=imported, cwd=folder)
    assert done.returncode == 0, f"{words}: {done.stderr[-3000:]}"
    return done.stdout


@pytest.fixture(scope="module")
def executed(tmp_path_factory) -> Path:
    """Return the folder in which the notebook ran as it stands, but for its seeds."""
    folder = tmp_path_factory.mktemp("documented")
    (folder / "recipes").mkdir()
    for path in (ROOT / "recipes").iterdir():
        (folder / "recipes" / path.name).symlink_to(path)
    text = NOTEBOOK.read_text(encoding="utf-8")
    for long, short in SHORTER.items():
        long, short = (json.dumps(part)[1:-1] for part in (long, short))
        assert text.count(long) == 1, long
        text = text.replace(long, short)
    (folder / "study.ipynb").write_text(text, encoding="utf-8")
    words = [sys.executable, "-c", EXECUTE, "study.ipynb", "executed.ipynb"]
    done = subprocess.run(words, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


@pytest.fixture(scope="module")
def demo(executed) -> Path:
    """Return a folder in which `make demo` and `make demo-nmt` seem to have run."""
    (executed / "runs" / "short").rename(executed / "runs" / "digits")
    recipe = executed / "recipes" / "digits"
    recipe.unlink()
    recipe.mkdir()
    for name in ("teacher.yaml", "student.yaml"):
        shutil.copy(executed / "runs" / "short.yaml", recipe / name)
    study = yaml.safe_load((executed / "runs" / "digits" / "study.yaml").read_text())
    for role in ("teacher", "student"):
        study[f"{role}s"][0]["config"] = f"{role}.yaml"
    (recipe / "study.yaml").write_text(yaml.safe_dump({**study, "output": "runs/digits"}))
    run(executed, "lskd", "study", "recipes/digits/study.yaml", "--cores", 2)
    # For pages over several studies any second one will do.
    shutil.copytree(executed / "runs" / "digits", executed / "runs" / "number_words_de_en")
    stand_ins(executed)
    return executed


def stand_ins(folder: Path) -> None:
    """Write what a command of the docs reads and no other makes."""
    photos, (first, second, *_) = folder / "photos", sorted((folder / "data" / "digits" / "val").iterdir())
    photos.mkdir()
    table = ["file,label"]
    for label in (first, second):
        for image in sorted(label.iterdir())[:5]:
            table.append(f"{image.name},{label.name}")
            shutil.copy(image, photos)
    (photos / "labels.csv").write_text("\n".join(table))
    for name in ("kaiming0", "kaiming1", "positive0", "positive1"):
        curves = folder / "work_dirs" / name / "epochs.csv"
        curves.parent.mkdir(parents=True)
        rows = (f"{epoch},{1 / (1 + epoch)},{50 + epoch}\n" for epoch in range(20))
        curves.write_text("epoch,train_ce,val_top1\n" + "".join(rows))
    (folder / "docs" / "images").mkdir(parents=True)
    shutil.copytree(ROOT / "docs" / "results", folder / "docs" / "results")


@pytest.fixture(scope="module")
def once(demo):
    """Return what runs a command in that folder, unless another page's line was the same."""
    done = {("lskd", "study", "recipes/digits/study.yaml", "--cores", "2")}  # by `demo`

    def run_once(words: list[str]) -> None:
        if tuple(words) not in done:
            mmcls = words[:2] == ["python", "-m"] and words[2].startswith("mmcls_bnn")
            run(demo, *words[words[0] == "python" :], imported=OTHERS if mmcls else STUDY)
            done.add(tuple(words))

    return run_once


def expanded(block: str, tmp_path: Path) -> list[list[str]]:
    """Let bash read a block, every command of which is one that only says how it was called."""
    shims, log = tmp_path / "shims", tmp_path / "log"
    shims.mkdir(exist_ok=True)
    log.write_text("")
    for name in {re.split(r"[\s|]", line.strip())[0] for line in block.splitlines()} | {
        "python",
        "mim",
        "lskd",
    }:
        if re.fullmatch(r"[a-z][a-z-]+", name) and name not in ("for", "done"):
            shim = shims / name
            # In one write: those of a block's background jobs do not mix.
            shim.write_text('#!/bin/sh\nprintf "%s\\0" "${0##*/}" "$@" "\n" >> "$LOG"\n')
            shim.chmod(0o755)
    known = {"PATH": str(shims), "LOG": str(log), "HOME": "~", "RANK": "0"}
    done = subprocess.run(
        [shutil.which("bash"), "-eu", "-c", block], cwd=tmp_path, env=known, capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (0, ""), block
    return [line.split("\0") for line in log.read_text().split("\0\n\0") if line]


def blocks(page: Path) -> list[tuple[str, str]]:
    """Return the fenced blocks of sh and Python, as (kind, text); fail at one that might be either."""
    found = [(match[1], textwrap.dedent(match[2])) for match in BLOCK.finditer(page.read_text())]
    assert {kind for kind, _ in found} <= {"sh", "python", "json", "yaml", ""}, page
    assert not re.search(COMMAND, "".join(text for kind, text in found if not kind), re.MULTILINE), page
    return [(kind, text) for kind, text in found if kind in ("sh", "python")]


def reason(words: list[str]) -> str:
    """Return what the command begins with in ``PARSED``; empty for one that runs."""
    return next((start for start in PARSED if f"{' '.join(words)} ".startswith(start)), "")


@cache
def help_of(module: str) -> str:
    return run(ROOT, "-m", module, "--help", imported=OTHERS)


def check(words: list[str], tmp_path: Path) -> None:
    """Let the command's own parser read it."""
    if "timm" in words[1:] or "lskd" in words[1:]:  # behind torchrun
        words = words[next(i for i, word in enumerate(words) if word in ("timm", "lskd")) :]
    name, *rest = [word for word in words if word != "..."]
    if name == "lskd":
        command, context = parsed(rest)
        if command == "study" and context.params["file"]:
            find_study_file(context.params["file"])
            check_snakemake_options(context.args)
    elif name == "timm":
        parse_arguments(rest[1:])
    elif name == "make":
        subprocess.run(["make", "-n", "-C", ROOT, *rest], check=True, capture_output=True)
    elif name == "pip":
        extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
        assert rest[:3] == ["install", "-c", "constraints.txt"]
        assert set(re.fullmatch(r"\.\[([a-z,]+)\]", rest[-1])[1].split(",")) <= extras.keys()
    elif name == "fairseq-hydra-train":
        options = dict(zip(rest[::2], rest[1::2], strict=False))
        assert (ROOT / options["--config-dir"] / f"{options['--config-name']}.yaml").is_file()
    elif name.startswith("fairseq-"):
        script = tmp_path / "parse.py"
        script.write_text(FAIRSEQ)
        run(ROOT, script, json.dumps([name, *rest]), imported=OTHERS)
    elif name == "python" and rest[0] == "-m" and rest[1] != "torch.distributed.run":
        flags = [word for word in rest[2:] if word.startswith("-")]
        assert all(re.search(rf"(?<![\w-]){flag}\b", help_of(rest[1])) for flag in flags), rest
    else:
        assert name in ("mim", "python", "cp", "tensorboard"), words
        assert name != "mim" or rest[:2] in (
            ["train", "mmcls"],
            ["test", "mmcls"],
            ["train", "mmpretrain"],
        )
    for path in re.findall(r"(?:recipes|plugins)/[\w/]+(?:\.\w+)?", " ".join(rest)):
        assert (ROOT / path).exists(), path


# The notebook


def outputs(book: nbformat.NotebookNode) -> tuple[set[str], str]:
    """Return the kinds of data that a notebook's cells show, and all that they print."""
    every = [output for cell in book.cells if cell.cell_type == "code" for output in cell.outputs]
    kinds = {kind for output in every for kind in output.get("data", {})}
    return kinds, "".join(output.get("text", "") for output in every)


def test_the_notebook_runs(demo):
    shown, text = outputs(nbformat.read(demo / "executed.ipynb", 4))
    assert {"text/html", "image/png"} <= shown  # data frames, and a figure
    assert "[4 of 4 done]" in text
    record = json.loads((demo / "runs" / "digits" / "verdicts.json").read_text())
    assert record["headline"]["answer"] in text


def test_the_notebook_is_stored_with_the_outputs_of_one_run():
    book = nbformat.read(NOTEBOOK, 4)
    nbformat.validate(book)
    counts = [cell.execution_count for cell in book.cells if cell.cell_type == "code"]
    assert counts == list(range(1, len(counts) + 1))
    shown, text = outputs(book)
    assert {"text/html", "image/png"} <= shown
    assert "[12 of 12 done]" in text
    assert book.metadata.kernelspec.name == "python3"
    # Of the machine that it ran on nothing but times.
    assert not re.search(r"/(home|root|tmp|work|usr|opt|Users)/|site-packages|Warning", NOTEBOOK.read_text())


# The pages


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_command_of_a_page_runs_or_parses(page, tmp_path, request):
    found = [] if page.name in ELSEWHERE else blocks(page)
    commands = [
        (kind, text) if kind == "python" else (kind, expanded(text, tmp_path)) for kind, text in found
    ]
    for kind, content in commands:
        if kind == "python":
            folder = request.getfixturevalue("demo")
            (folder / "block.py").write_text(content)
            run(folder, folder / "block.py")
            continue
        for words in content:
            if reason(words):
                check(words, tmp_path)
            elif words[0] in ("lskd", "timm", "python"):
                request.getfixturevalue("once")(words)
            else:
                pytest.fail(f"{words} is of no kind that is run or parsed; say in PARSED why")


def test_every_reason_is_still_needed(tmp_path):
    told = {
        reason(words)
        for page in PAGES
        if page.name not in ELSEWHERE
        for kind, text in blocks(page)
        if kind == "sh"
        for words in expanded(text, tmp_path)
    }
    assert PARSED.keys() - told == set()
    named = set(re.findall(r"test_\w+\.py", " ".join(PARSED.values())))
    assert named <= {path.name for path in (ROOT / "tests").rglob("test_*.py")}


def test_every_picture_has_its_command_beside_it():
    pictures = set()
    for page in PAGES:
        text = page.read_text()
        commands = "".join(block for _, block in blocks(page)) + "".join(
            re.findall("<!--.*?-->", text, re.DOTALL)
        )
        for name in re.findall(r"!\[[^\]]*\]\((?:docs/)?images/([\w.]+)\)", text):
            pictures.add(name)
            assert f"docs/images/{name}" in commands, name
    assert pictures == {path.name for path in (ROOT / "docs" / "images").iterdir()}
