# Each target is one line over the command `readcache <verb>`; a variable is the option of that name in lower case.
# Nothing here decides whether work is needed: a cache is found by the fingerprint of its recipe, never by file times.

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin

INPUTS := TASK BACKBONE STORE DATA TOKENS LAYERS CODEC MAX_LENGTH PROMPT WORDS LIMIT ORDER_SEED SEED DEVICE
TRAIN  := DASK LABEL CELL HIDDEN POOL HEAD EPOCHS LR BATCH SEEDS TRACK CACHE
OFRUN  := STORE DEVICE RUN TASK SPLIT
ALWAYS := CONFIG SET

# $(call options,NAMES): --name 'value' for each variable that is set; values are taken as they are, quotes and dollars too
quote   = '$(subst ','\'',$(value $(1)))'
options = $(foreach v,$(1) $(ALWAYS),$(if $(value $(v)),--$(shell echo $(v) | tr A-Z_ a-z-) $(call quote,$(v)))) $(if $(filter-out 0,$(JSON)),--json)

.DEFAULT_GOAL := help
.PHONY: help install plan extract train sweep ablate evaluate predict catalog report bench test lint

help: ## every target, with its variables
	@sed -n 's/^\([a-z]*\):[^#]*## \(.*\)/\1\t\2/p' $(firstword $(MAKEFILE_LIST)) | expand -t 10
	@echo; echo "Everywhere: JSON=1 prints one JSON document, CONFIG=file.yaml, SET=key=value. Defaults and units: .venv/bin/readcache <verb> --help"

install: $(VENV)/.stamp ## what the commands need, into .venv (every target does this first)

$(VENV)/.stamp: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed; say PYTHON=python3.11")'
	@echo "installing into $(VENV), once" >&2
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[demo]' >&2
	@touch $@

$(VENV)/.stamp-dev: $(VENV)/.stamp
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[demo,dev]' >&2
	@touch $@

$(VENV)/.stamp-sweep: $(VENV)/.stamp
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[demo,sweep]' >&2
	@touch $@

$(VENV)/.stamp-track: $(VENV)/.stamp
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[demo,track]' >&2
	@touch $@

$(VENV)/.stamp-bench: $(VENV)/.stamp
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[demo,bench]' >&2
	@touch $@

plan: install ## what stage one would do, and how large it would be: TASK BACKBONE STORE DATA TOKENS LAYERS CODEC MAX_LENGTH PROMPT WORDS LIMIT SEED DEVICE SPLITS
	@$(BIN)/readcache plan $(call options,$(INPUTS) SPLITS)

extract: install ## stage one, every split of the task: the same variables, DASK
	@$(BIN)/readcache extract $(call options,$(INPUTS) SPLITS DASK)

train: install $(if $(filter tensorboard trackio,$(TRACK)),$(VENV)/.stamp-track) ## stage two, extracting first what is missing: the same, CELL HIDDEN POOL HEAD EPOCHS LR BATCH SEEDS TRACK LABEL CACHE NO_EXTRACT=1
	@$(BIN)/readcache train $(call options,$(INPUTS) $(TRAIN)) $(if $(filter-out 0,$(NO_EXTRACT)),--no-extract)

sweep: install $(if $(TRIALS),$(VENV)/.stamp-sweep) ## many heads in a few passes: GRID=grid.yaml, TRIALS (Optuna proposes), WIDTH; the variables of train
	@$(BIN)/readcache sweep $(call options,$(INPUTS) $(TRAIN) GRID TRIALS WIDTH) $(if $(filter-out 0,$(NO_EXTRACT)),--no-extract)

ablate: install ## READ beside its controls, from the same cache: the same variables, SEEDS=5
	@$(BIN)/readcache ablate $(call options,$(INPUTS) $(TRAIN)) $(if $(filter-out 0,$(NO_EXTRACT)),--no-extract)

evaluate: install ## scores of a saved run on a split: RUN TASK SPLIT STORE DEVICE BATCH
	@$(BIN)/readcache evaluate $(call options,$(OFRUN) BATCH)

predict: install ## labels for new text: RUN TEXT TEXT_PAIR, or FILE=in.jsonl, or SPLIT of the cache; STORE DEVICE BACKBONE
	@$(BIN)/readcache predict $(call options,$(OFRUN) TEXT TEXT_PAIR FILE BACKBONE)

catalog: install ## caches and runs under STORE
	@$(BIN)/readcache catalog $(call options,STORE)

report: install ## one HTML page and one Markdown file of all runs under STORE
	@$(BIN)/readcache report $(call options,STORE)

bench: $(VENV)/.stamp-bench ## the tables of the README: WHAT=extract, read, train, heads, codec (all five where left out), glue or recipes, DATA REPEATS …
	@$(BIN)/readcache bench $(WHAT) $(call options,$(INPUTS) $(TRAIN) ONLY REPEATS)

test: $(VENV)/.stamp-dev ## all tests, offline, on the CPU: ARGS="-k store"
	@$(BIN)/python -m pytest $(ARGS)

lint: $(VENV)/.stamp-dev ## style, types
	@$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy
