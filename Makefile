# Everything runs in .venv: made on first use, brought up to date when pyproject.toml or constraints.txt changes.
PYTHON ?= python3
ARGS ?=
BIN := .venv/bin
INSTALL := $(BIN)/python -m pip install -c constraints.txt

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo test chaos slow soak fuzz check bench peers up down clean

help: ## what there is to make
	@sed -n 's/^\([a-z]*\):.*## \(.*\)/  make \1	\2/p' Makefile

demo: .venv/.demo ## segment the images in examples/nuclei with the shipped model, into demo-out/
	@$(BIN)/python examples/demo.py

test: .venv/.dev ## the tests; more for pytest in ARGS="..."
	OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m "not slow and not gpu" --durations=8 $(ARGS)

chaos: .venv/.dev ## kills and faults at random moments: long
	$(BIN)/python -m pytest -m slow --timeout=7200 tests/chaos tests/flows tests/infra tests/pipeline/engine/test_jobs.py tests/pipeline/table/test_forget.py $(ARGS)

slow: .venv/.dev ## every test that takes minutes: hours; MASKMILL_TEST_DATA names the folder of labelled data
	$(BIN)/python -m pytest -m "slow and not gpu" --timeout=7200 $(ARGS)

soak: .venv/.dev ## half an hour of faults, kills and arrivals, then what was lost; ARGS="--minutes 3"
	$(BIN)/python tests/chaos/soak.py $(ARGS)

fuzz: .venv/.dev ## ten minutes for everything that reads foreign bytes; ARGS="--seconds 60 decode"
	$(BIN)/python tests/fuzz $(ARGS)

check: .venv/.dev ## lint, format, types, direction of imports
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: .venv/.dev ## every benchmark, one after the other: long
	@set -e; for script in benchmarks/*.py; do echo "== $$script"; $(BIN)/python "$$script" $(ARGS); done

peers: .venv/.dev .venv-peers/.done ## what `benchmarks/peers.py` compares with and is not in .venv, into .venv-peers

up: .venv/.dev ## Prefect, Ray and an S3 store on this machine, for the tour in README.md; ports in ARGS="..."
	@$(BIN)/python infra/local_site.py up $(ARGS)

down: ## end exactly those
	@$(BIN)/python infra/local_site.py down

clean: ## remove what the demo and the tools wrote; .venv stays
	rm -rf demo-out build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .import_linter_cache .hypothesis fuzz-findings

.venv/.demo: pyproject.toml constraints.txt | .venv/pyvenv.cfg
	$(INSTALL) -e '.[ray]'
	@touch $@

.venv/.dev: pyproject.toml constraints.txt | .venv/pyvenv.cfg
	$(INSTALL) -e '.[ray,prefect,dev]'
	@touch .venv/.demo $@

# The packages of .venv are found after its own, so nothing large is installed twice.
.venv-peers/.done: benchmarks/side_by_side/requirements.txt | .venv/pyvenv.cfg
	$(BIN)/python -m venv .venv-peers
	.venv-peers/bin/python -m pip install --quiet --no-deps -r $<
	$(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' \
		> "$$(.venv-peers/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/maskmill-venv.pth"
	@touch $@

.venv/pyvenv.cfg:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Maskmill needs Python 3.11 or newer. Name yours: make PYTHON=python3.12 ..." >&2; exit 1; }
	@$(PYTHON) -m venv .venv || \
		{ rm -rf .venv; echo "Python's venv is missing: on Debian and Ubuntu, apt install python3-venv" >&2; exit 1; }
	@$(BIN)/python -m pip install --quiet 'pip>=24'
	@echo "Installing into .venv. PyTorch brings its CUDA libraries, about 6 GB on disk: this takes minutes, once."
