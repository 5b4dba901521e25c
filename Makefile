# Everything works from a bare checkout with Python 3.11 or 3.12 and make; nothing needs a GPU or an account.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
# On a small busy machine two OpenMP threads can be ten times slower than one.
export OMP_NUM_THREADS ?= 1
# Or each of the hundred processes that the tests start would compile all of the source.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: help install demo demo-bnn demo-nmt test test-numerical faults fuzz coverage mutants gates lint bench bench-growth clean
help:
	@echo "make install   create $(VENV) with everything pinned in constraints.txt"
	@echo "make demo      does a label-smoothed teacher distil a better student? on real digits -> runs/digits/index.html"
	@echo "make demo-bnn  the same for a binary student: runs/digits_bnn/index.html"
	@echo "make demo-nmt  the same in translation, on number words: runs/number_words_de_en/index.html"
	@echo "make test      all tests"
	@echo "make test-numerical  what computes, with other instructions of the CPU (AVX2) and other code"
	@echo "make faults    kills and other faults at random moments, hours -> docs/reliability/*.csv"
	@echo "make coverage  branches that the tests reach: 95 % of the core, 90 % of the rest"
	@echo "make mutants   break the core in small ways and see tests fail: hours, goes on where it was (MODULES=... SAMPLE=150)"
	@echo "make gates     all tests offline, not as root, in an odd path, at a load of 15, by other instructions, on the other Python (PLACES='offline user path load numerical python')"
	@echo "make lint      ruff, mypy and the contracts of imports"
	@echo "make fuzz      hostile inputs to every reader, hours -> docs/reliability/fuzz*.csv"
	@echo "make bench     ratios against peers -> benchmarks/results.json"
	@echo "make bench-growth  how cost grows -> benchmarks/growth.csv, growth_sizes.csv and .png"
	@echo "make clean     remove $(VENV) and caches (runs/ and data/ stay)"

install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt hatch_build.py common/lskd/kernel/rows.c plugins/mmcls_bnn/binary/xnor.c
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))' \
	  || { echo "make: $(PYTHON) is not Python 3.11 or 3.12; say which one to use: make PYTHON=python3.11" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[all,dev]'
	@touch $@

demo: install
	$(BIN)/lskd study recipes/digits/study.yaml --cores 2

demo-bnn: install
	$(BIN)/lskd study recipes/digits_bnn/study.yaml --cores 2

demo-nmt: install
	$(BIN)/lskd study recipes/number_words_de_en/study.yaml --cores 2

# Two files at a time, in random order, and so are the tests of a file. The first lines name the seed, and
# `make test PYTEST_ADDOPTS=--randomly-seed=SEED` runs in that order again.
test: install
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

# What computes, once more as a CPU without AVX-512 does it, and without the compiled loss.
NUMERICAL = tests/lskd tests/fairseq_kd/test_criterion.py tests/integration/test_mmcls_commands.py::test_two_processes_equal_one \
  $(patsubst %,tests/mmcls_bnn/test_%.py,classifier fast fast_teacher layers packed reactnet teacher) \
  $(patsubst %,tests/timm_ls_kd/test_%.py,fast_teacher loops replay soft_labels task)
test-numerical: install
	ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 $(BIN)/python -m pytest -n 2 --dist loadfile --no-compiled-loss $(NUMERICAL)

# One process at a time, so that what is measured is not disturbed by another fault.
faults: install
	$(BIN)/python -m pytest tests/faults --long -s

# The whole suite, or a part: make coverage COVERED=tests/lskd. What a SIGKILL ends is not counted. Asked of the branches.
COVERED = tests common
BRANCHES = import json, sys; found = json.load(sys.stdin)["totals"]["percent_branches_covered"]; \
	print(f"{found:.1f} % of the branches, {sys.argv[1]} asked"); sys.exit(found < float(sys.argv[1]))
coverage: install
	rm -rf .coverage
	$(BIN)/python -m coverage run -m pytest -n 2 --dist loadfile $(COVERED)
	$(BIN)/python -m coverage combine --quiet
	$(BIN)/python -m coverage report --skip-covered --show-missing
	$(BIN)/python -m coverage json -q --include='common/lskd/*' -o - | $(BIN)/python -c '$(BRANCHES)' 95
	$(BIN)/python -m coverage json -q --omit='common/lskd/*' -o - | $(BIN)/python -c '$(BRANCHES)' 90

mutants: install
	$(BIN)/python tests/gates/mutants.py $(SAMPLE:%=--sample %) $(MODULES)

gates: install
	VENV=$(VENV) tests/gates/environments $(PLACES)

# FUZZ_MINUTES=60 bounds these, FUZZ_SEED=2 makes other inputs; what fails is kept in ${TMPDIR:-/tmp}/lskd-fuzz.
# Then, where atheris is installed, inputs that coverage guides: a minute for each reader, GUIDED='--seconds 600' for ten.
fuzz: install
	@status=0; $(BIN)/python -m pytest -p no:randomly --long -s -q tests/fuzz || status=1; \
	if $(BIN)/python -c 'import atheris' 2>/dev/null; then $(BIN)/python tests/fuzz/guided.py $(FUZZ_SEED:%=--seed %) $(GUIDED) || status=1; \
	else echo "no inputs guided by coverage: that takes $(BIN)/pip install atheris"; fi; exit $$status

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: install
	$(BIN)/python -m pytest -q -s benchmarks

bench-growth: install
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/growth

clean:
	rm -rf $(VENV) dist .coverage .mutants .mypy_cache .ruff_cache .pytest_cache .hypothesis .benchmarks
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
