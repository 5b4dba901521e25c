"""Mutation testing of the core: break the code in small ways, one at a time, and see that a test fails.

    .venv/bin/python tests/gates/mutants.py [--sample N] [MODULE ...]

The tests are collected once, and each mutant runs in a process forked from there: its functions get their
code from the mutated source, and the tests that reach its lines run, quickest first, until one fails; those
that take longer than `SLOWEST` do not count. What is done is kept in `.mutants/` and not done again while
module and tests are the same, so a run can be broken off. With --sample, of a module that has more, N drawn
from its name are tried; the table says of how many.

A survivor is a hole in the tests, or has a line in docs/reliability/mutants.csv that says why it is none.
(mutmut 3.8 knows only the roots `.`, `src` and `source`, and leaves out what is decorated and constants;
cosmic-ray starts a process for each mutant, five seconds of imports.)
"""

import argparse
import ast
import csv
import gc
import hashlib
import importlib
import inspect
import math
import os
import random
import resource
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import CodeType, FrameType, FunctionType
from typing import Any

import hypothesis
import pytest
from _pytest.runner import runtestprotocol

ROOT = Path(__file__).parents[2]
STATE = ROOT / ".mutants"
EXPLAINED = ROOT / "docs" / "reliability" / "mutants.csv"
COUNTS = ROOT / "docs" / "reliability" / "mutation.csv"

SLOWEST = 3.0  # seconds of CPU time: simulations, which kill little that nothing else does

CORE, STUDY = "tests/lskd/test_{}.py", "tests/lskd_study/test_{}.py"
_LOSSES = [CORE.format(name) for name in ("losses", "targets", "distillation_terms")]
_PASSES = [CORE.format(name) for name in ("fused", "losses", "without_a_card")]
_PASSES.append("-knot native")  # which has rows.c compiled anew for each test
_VERDICTS = [STUDY.format(name) for name in ("claims", "verdicts", "verdicts_file", "recommendation")]
MODULES = {
    "lskd.kernel.chunks": _PASSES,
    "lskd.kernel.fused": _PASSES,
    "lskd.loss": [CORE.format("losses")],
    "lskd.targets": [*_LOSSES, CORE.format("binary")],
    "lskd.terms": [*_LOSSES, CORE.format("binary")],
    "lskd.stability": [CORE.format(name) for name in ("stability", "small_classes")],
    "lskd_study.stats.bleu": [STUDY.format("bleu")],
    "lskd_study.stats.bootstrap": [STUDY.format(name) for name in ("bootstrap", "bleu")],
    "lskd_study.stats.chances": [STUDY.format("chances")],
    "lskd_study.stats.intervals": [
        STUDY.format(name) for name in ("statistics", "pooled_variance", "chances")
    ],
    "lskd_study.stats.moderated": [STUDY.format("pooled_variance")],
    "lskd_study.stats.power": [STUDY.format("power")],
    "lskd_study.stats.ranks": [STUDY.format("ranks")],
    "lskd_study.stats.sequential": [STUDY.format("sequential")],
    "lskd_study.stats.trends": [STUDY.format(name) for name in ("trends", "ranks")],
    "lskd_study.claims.by_class": [STUDY.format("costs")],
    "lskd_study.claims.contrasts": [
        *_VERDICTS,
        *(STUDY.format(n) for n in ("study_measures", "student_seeds")),
    ],
    "lskd_study.claims.findings": [*_VERDICTS, STUDY.format("controls")],
    "lskd_study.claims.judging": [
        *_VERDICTS,
        *(STUDY.format(name) for name in ("controls", "pooled_variance", "student_seeds")),
    ],
    "lskd_study.claims.measures": [STUDY.format(name) for name in ("study_measures", "student_seeds")],
    "lskd_study.claims.outlook": [
        STUDY.format(name) for name in ("recommendation", "planning", "own", "controls", "student_seeds")
    ],
    "lskd_study.claims.recommendation": _VERDICTS,
    "lskd_study.claims.several": _VERDICTS,
    "lskd_study.claims.statements": [*_VERDICTS, STUDY.format("controls")],
}

COMPARED: dict[type[ast.cmpop], tuple[type[ast.cmpop], ...]] = {
    ast.Lt: (ast.LtE, ast.GtE),
    ast.LtE: (ast.Lt, ast.Gt),
    ast.Gt: (ast.GtE, ast.LtE),
    ast.GtE: (ast.Gt, ast.Lt),
    ast.Eq: (ast.NotEq,),
    ast.NotEq: (ast.Eq,),
    ast.Is: (ast.IsNot,),
    ast.IsNot: (ast.Is,),
    ast.In: (ast.NotIn,),
    ast.NotIn: (ast.In,),
}
COMPUTED: dict[type[ast.operator], type[ast.operator]] = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Div,
    ast.Div: ast.Mult,
    ast.FloorDiv: ast.Mult,
    ast.Mod: ast.Mult,
    ast.Pow: ast.Mult,
    ast.BitAnd: ast.BitOr,
    ast.BitOr: ast.BitAnd,
}
PAIRS = ("min max", "any all", "argmin argmax", "floor ceil", "sum mean", "amin amax", "append extend")
NAMES = {a: b for pair in PAIRS for a, b in (pair.split(), pair.split()[::-1])}
UNTOUCHED = (ast.JoinedStr, ast.AnnAssign)  # messages; annotated names are fields of dataclasses


@dataclass
class Mutant:
    """What stands where in the tree instead of what, and the lines whose tests see it."""

    name: str
    line: int
    last_line: int
    arguments: ast.arguments | None  # whose default it is a part of
    parent: ast.AST
    field: str
    place: int | None
    new: ast.AST

    def put(self) -> None:
        """Change the tree."""
        ast.copy_location(self.new, self.parent)
        if self.place is None:
            setattr(self.parent, self.field, self.new)
        else:
            getattr(self.parent, self.field)[self.place] = self.new


def _instead(node: ast.AST) -> Iterator[ast.AST]:
    """Yield what may stand in a node's place."""
    match node:
        case ast.Compare(left, ops, comparators):
            for i, old in enumerate(ops):
                for new in COMPARED[type(old)]:
                    yield ast.Compare(left, [*ops[:i], new(), *ops[i + 1 :]], comparators)
        case ast.BinOp(left, op, right) if type(op) in COMPUTED:
            yield ast.BinOp(left, COMPUTED[type(op)](), right)
        case ast.BoolOp(op, values):
            yield ast.BoolOp(ast.And() if isinstance(op, ast.Or) else ast.Or(), values)
        case ast.UnaryOp(ast.Not() | ast.USub() | ast.Invert(), operand):
            yield operand
        case ast.Constant(bool() as value):
            yield ast.Constant(not value)
        case ast.Constant(int() | float() as value):
            yield ast.Constant(value + 1)
        case ast.IfExp(_, body, orelse):
            yield from (body, orelse)
        case ast.Call(function, arguments, keywords):
            for i in range(len(keywords)):
                yield ast.Call(function, arguments, keywords[:i] + keywords[i + 1 :])
            if isinstance(function, ast.Attribute) and function.attr in NAMES:
                other = ast.Attribute(function.value, NAMES[function.attr], ast.Load())
                yield ast.Call(other, arguments, keywords)
            if isinstance(function, ast.Name) and function.id in NAMES:
                yield ast.Call(ast.Name(NAMES[function.id], ast.Load()), arguments, keywords)
        case ast.If(test, body, orelse) if not isinstance(test, ast.Compare | ast.UnaryOp):
            yield ast.If(ast.UnaryOp(ast.Not(), test), body, orelse)
        case ast.Expr(ast.Call()) | ast.Raise() | ast.AugAssign() | ast.Break() | ast.Continue():
            yield ast.Pass()


def _shown(old: ast.AST, new: ast.AST) -> str:
    if isinstance(old, ast.Call) and isinstance(new, ast.Call) and len(old.keywords) > len(new.keywords):
        (gone,) = (one for one in old.keywords if one not in new.keywords)
        return f"{ast.unparse(old.func)}() without {ast.unparse(gone)}"
    return " -> ".join(" ".join(ast.unparse(one).split())[:90] for one in (old, new))


def mutants(tree: ast.Module) -> list[Mutant]:
    """Return the mutants of a module's functions and of its constants."""
    found: list[Mutant] = []
    seen: Counter[str] = Counter()

    def visit(
        parent: ast.AST, where: str, statement: ast.stmt | None, arguments: ast.arguments | None = None
    ) -> None:
        for field, value in ast.iter_fields(parent):
            if field in ("annotation", "returns", "decorator_list", "type_params"):
                continue
            for place, node in enumerate(value) if isinstance(value, list) else [(None, value)]:
                if not isinstance(node, ast.AST) or isinstance(node, UNTOUCHED):
                    continue
                inside, own = where, statement
                if isinstance(node, ast.FunctionDef | ast.ClassDef):
                    inside = f"{where}.{node.name}" if where else node.name
                if isinstance(node, ast.stmt):
                    own = node
                elif own is None:
                    continue
                if where or isinstance(own, ast.Assign):
                    body = getattr(own, "body", None)
                    last = body[0].lineno - 1 if body else own.end_lineno
                    for new in _instead(node):
                        text = f"{where or '(constants)'}: {_shown(node, new)}"
                        seen[text] += 1
                        text += f" ({seen[text]})" if seen[text] > 1 else ""
                        line = max(last or 0, own.lineno)
                        found.append(Mutant(text, own.lineno, line, arguments, parent, field, place, new))
                own_defaults = isinstance(parent, ast.FunctionDef) and isinstance(node, ast.arguments)
                visit(node, inside, own, node if own_defaults else arguments)

    visit(tree, "", None)
    return found


class Live:
    """A module as it runs: its source, and where its functions are."""

    def __init__(self, name: str) -> None:
        self.module = importlib.import_module(name)
        self.file = str(self.module.__file__)
        self.tree = ast.parse(Path(self.file).read_text(encoding="utf-8"))
        gc.unfreeze()
        self.functions = [
            one
            for one in gc.get_objects()
            if type(one) is FunctionType and one.__code__.co_filename == self.file
        ]
        gc.freeze()

    def become(self, mutant: Mutant) -> None:
        """Turn into the mutant, in this process."""
        mutant.put()
        ast.fix_missing_locations(self.tree)
        codes: dict[tuple[str, int], CodeType] = {}
        left = [compile(self.tree, self.file, "exec")]
        while left:
            code = left.pop()
            codes[code.co_qualname, code.co_firstlineno] = code
            left += [one for one in code.co_consts if isinstance(one, CodeType)]
        for function in self.functions:
            old = function.__code__
            if new := codes.get((old.co_qualname, old.co_firstlineno)):
                function.__code__ = new
        if mutant.arguments:
            self._defaults(mutant.arguments)
        if mutant.name.startswith("(constants)"):
            self._constants(mutant.line)
        self.forget()

    def forget(self) -> None:
        """Empty the module's caches."""
        for cached in vars(self.module).values():
            if hasattr(cached, "cache_clear"):
                cached.cache_clear()

    def _value(self, expression: ast.expr) -> Any:
        return eval(compile(ast.Expression(expression), self.file, "eval"), vars(self.module))

    def _defaults(self, arguments: ast.arguments) -> None:
        owner = next(n for n in ast.walk(self.tree) if isinstance(n, ast.FunctionDef) and n.args is arguments)
        first = min(node.lineno for node in (owner, *owner.decorator_list))  # as a code object has it
        for function in self.functions:
            if function.__name__ == owner.name and function.__code__.co_firstlineno == first:
                function.__defaults__ = tuple(self._value(one) for one in arguments.defaults)
                pairs = zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True)
                function.__kwdefaults__ = {n.arg: self._value(one) for n, one in pairs if one is not None}

    def _constants(self, line: int) -> None:
        (node,) = (n for n in self.tree.body if isinstance(n, ast.Assign) and n.lineno == line)
        for target in node.targets:
            of_many = isinstance(target, ast.Tuple)
            names, value = target.elts if of_many else [target], self._value(node.value)
            for name, new in zip(names, value if of_many else [value], strict=True):
                old = vars(self.module)[name.id]
                for module in [m for n, m in sys.modules.items() if n.startswith("lskd")]:
                    if vars(module).get(name.id) is old:
                        setattr(module, name.id, new)


def _fails(items: list[pytest.Item]) -> bool:
    following = [*items[1:], None]
    for item, after in zip(items, following, strict=True):
        if any(report.failed for report in runtestprotocol(item, log=False, nextitem=after)):
            return True
    return False


def _forked(work: Any, cpu: float) -> int:
    """Return how a child ends that does `work` in at most so much CPU time."""
    child = os.fork()
    if child == 0:
        silent = os.open(os.devnull, os.O_RDWR)
        for number in (0, 1, 2):
            os.dup2(silent, number)
        resource.setrlimit(resource.RLIMIT_CPU, (int(cpu) + 1, int(cpu) + 2))
        status = 2
        with suppress(BaseException):
            status = int(work())
        os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def _too_slow(*_: object) -> None:
    raise TimeoutError("too slow to be run for each mutant")


class Gate:
    """Takes over from pytest after the collection: `survivors` are what no test kills."""

    def __init__(self, name: str, sample: int) -> None:
        self.name, self.sample, self.survivors, self.counts, self.all = name, sample, [], Counter(), 0

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        """Run the mutants instead of the tests."""
        if session.testsfailed:
            raise pytest.UsageError("the tests could not be collected")
        live = Live(self.name)
        tests = sorted({item.path for item in session.items} | {ROOT / "tests" / "draws.py"})
        of = [hashlib.sha256(Path(live.file).read_bytes()).hexdigest()]
        of.append(hashlib.sha256(b"".join(file.read_bytes() for file in tests)).hexdigest())
        STATE.mkdir(exist_ok=True)
        kept, done = STATE / f"{self.name}.csv", {}
        if kept.exists():
            before, *rows = csv.reader(kept.read_text(encoding="utf-8").splitlines())
            # What was killed stays so when tests are added; what survived is tried with the new ones.
            if before[0] == of[0]:
                done = {row[0]: row[1] for row in rows if row[1] == "killed" or before == of}
        reached = self._reached(session.items, live)
        explained = [row["mutation"] for row in _rows(EXPLAINED) if row["module"] == self.name]
        with kept.open("w", encoding="utf-8", newline="") as file:
            written = csv.writer(file)
            written.writerows([of, *done.items()])
            todo = mutants(live.tree)
            self.all = len(todo)
            if self.sample < len(todo):
                todo = random.Random(self.name).sample(todo, self.sample)
            for number, mutant in enumerate(todo):
                if mutant.name not in done:
                    done[mutant.name] = self._try(live, mutant, reached)
                    written.writerow([mutant.name, done[mutant.name]])
                    file.flush()
                status = done[mutant.name]
                if status != "killed" and mutant.name in explained:
                    status = "explained"
                self.counts[status] += 1
                if status not in ("killed", "explained"):
                    self.survivors.append(mutant.name)
                    print(f"{number + 1}/{len(todo)} {status}: line {mutant.line}: {mutant.name}", flush=True)
        return True

    def _reached(self, items: list[pytest.Item], live: Live) -> list[tuple[float, pytest.Item, set[int]]]:
        """Return the tests with the CPU time that they take and the lines that they reach, quickest first."""
        here, there = os.pipe()
        if os.fork() == 0:
            os.close(here)
            signal.signal(signal.SIGVTALRM, _too_slow)
            with os.fdopen(there, "w") as out:
                for number, item in enumerate(items):
                    lines: set[int] = set()

                    def local(frame: FrameType, event: str, _: object, lines: set[int] = lines) -> Any:
                        lines.add(frame.f_lineno)
                        return local

                    def trace(frame: FrameType, *_: object, local: Any = local) -> Any:
                        return local if frame.f_code.co_filename == live.file else None

                    live.forget()  # or only the first test would reach what it computes
                    sys.settrace(trace)
                    threading.settrace(trace)
                    start = time.process_time()
                    signal.setitimer(signal.ITIMER_VIRTUAL, SLOWEST)
                    failed = _fails([item])
                    left, _ = signal.setitimer(signal.ITIMER_VIRTUAL, 0)
                    sys.settrace(None)
                    threading.settrace(None)  # type: ignore[arg-type]
                    # The timer's clock is coarser than this one and may run ahead of it.
                    took = time.process_time() - start if left else math.inf
                    print(number, int(failed), took, *sorted(lines), file=out, flush=True)
            os._exit(0)
        os.close(there)
        found = []
        with os.fdopen(here) as answers:
            for line in answers:
                number, failed, took, *lines = line.split()
                if float(took) > SLOWEST:
                    continue
                if int(failed):
                    raise pytest.UsageError(f"{items[int(number)].nodeid} fails without a mutant")
                found.append((float(took), items[int(number)], {int(one) for one in lines}))
        os.wait()
        return sorted(found, key=lambda one: one[0])

    def _try(self, live: Live, mutant: Mutant, reached: list[tuple[float, pytest.Item, set[int]]]) -> str:
        if mutant.name.startswith("(constants)") or mutant.arguments:
            chosen = [(took, item) for took, item, lines in reached if lines]
        else:
            own = set(range(mutant.line, mutant.last_line + 1))
            chosen = [(took, item) for took, item, lines in reached if lines & own]
        if not chosen:
            return "not reached"

        def work() -> bool:
            live.become(mutant)
            return _fails([item for _, item in chosen])

        return "survived" if _forked(work, 5 * sum(took for took, _ in chosen) + 10) == 0 else "killed"


def _rows(file: Path) -> list[dict[str, str]]:
    return [*csv.DictReader(file.read_text(encoding="utf-8").splitlines())] if file.exists() else []


def one(name: str, sample: int) -> int:
    """Try the mutants of one module, at most so many; return how many nobody has explained."""
    hypothesis.settings.register_profile(
        "mutants",
        derandomize=True,
        database=None,
        deadline=None,
        phases=[hypothesis.Phase.explicit, hypothesis.Phase.generate],
    )
    hypothesis.settings.load_profile("mutants")
    gate = Gate(name, sample)
    source = inspect.getsourcefile(importlib.import_module(name))
    files = [*MODULES[name], str(source)]
    plugins = [f"-pno:{plugin}" for plugin in ("randomly", "xdist", "cacheprovider", "benchmark")]
    asked = ["-q", "--assert=plain", "--tb=no", "--timeout=120", "-m", "not integration and not gpu"]
    status = pytest.main([*plugins, *asked, *files], plugins=[gate])
    if not gate.counts or status not in (0, 5):
        return 1
    all_of_them = sum(gate.counts.values())
    killed, explained = gate.counts["killed"], gate.counts["explained"]
    counts = {
        "mutants": all_of_them,
        "killed": killed,
        "explained": explained,
        "survived": len(gate.survivors),
        "of": gate.all,
    }
    print(f"{name}: {', '.join(f'{number} {what}' for what, number in counts.items())}")
    rows = {row["module"]: row for row in _rows(COUNTS)}
    rows[name] = {"module": name} | {what: str(number) for what, number in counts.items()}
    COUNTS.parent.mkdir(parents=True, exist_ok=True)
    with COUNTS.open("w", encoding="utf-8", newline="") as file:
        table = csv.DictWriter(file, list(rows[name]), lineterminator="\n")
        table.writeheader()
        table.writerows(rows[key] for key in MODULES if key in rows)
    return len(gate.survivors)


if __name__ == "__main__":
    asked = argparse.ArgumentParser(description="mutation testing of the core, module by module")
    asked.add_argument("modules", nargs="*", metavar="MODULE", help=f"of {', '.join(MODULES)}; none: all")
    asked.add_argument("--list", action="store_true", help="say how many mutants there are")
    asked.add_argument("--sample", type=int, default=10**9, metavar="N", help="of each module at most N")
    words = asked.parse_args()
    if unknown := set(words.modules) - set(MODULES):
        asked.error(f"no such module: {', '.join(sorted(unknown))}")
    if words.list:
        for name in words.modules or MODULES:
            source = importlib.util.find_spec(name).origin
            print(name, len(mutants(ast.parse(Path(source).read_text(encoding="utf-8")))))
    elif len(words.modules) == 1:
        os.chdir(ROOT)
        sys.exit(min(one(words.modules[0], words.sample), 1))
    else:  # each in a process of its own, with its own tests
        itself = [sys.executable, __file__, f"--sample={words.sample}"]
        sys.exit(max(subprocess.call([*itself, name]) for name in words.modules or MODULES))
