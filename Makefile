# Each target is one line over the command `readcache <verb>`; a variable is the option of that name in lower case.
# Nothing here decides whether work is needed: a cache is found by the fingerprint of its recipe, never by file times.

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin

INPUTS := TASK BACKBONE STORE DATA TOKENS LAYERS CODEC MAX_LENGTH PROMPT WORDS LIMIT ORDER_SEED SEED DEVICE
COPIES := CACHE STORE
TRAIN  := DASK LABEL CELL HIDDEN POOL HEAD EPOCHS LR BATCH SEEDS TRACK CACHE
OFRUN  := STORE DEVICE RUN TASK SPLIT
ALWAYS := CONFIG SET

# $(call options,NAMES): --name 'value' for each variable that is set; values are taken as they are, quotes and dollars too
# $(call flags,NAMES): --name for each that is 1
quote   = '$(subst ','\'',$(value $(1)))'
flags   = $(foreach v,$(1),$(if $(filter-out 0,$($(v))),--$(shell echo $(v) | tr A-Z_ a-z-)))
options = $(foreach v,$(1) $(ALWAYS),$(if $(value $(v)),--$(shell echo $(v) | tr A-Z_ a-z-) $(call quote,$(v)))) $(if $(filter-out 0,$(JSON)),--json)

.DEFAULT_GOAL := help
.PHONY: help install plan extract train sweep ablate evaluate predict catalog report verify repair explain du gc pin unpin push pull bench test lint

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

$(VENV)/.stamp-s3: $(VENV)/.stamp
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[demo,s3]' >&2
	@touch $@

$(VENV)/.stamp-track: $(VENV)/.stamp
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[demo,track]' >&2
	@touch $@

$(VENV)/.stamp-bench: $(VENV)/.stamp
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[demo,bench]' >&2
	@touch $@

# an address s3://… needs the s3 extra; where it is installed already this costs nothing
ifneq ($(findstring s3://,$(STORE)$(TO)$(SOURCE)),)
install: $(VENV)/.stamp-s3
endif

plan: install ## what stage one would do, and how large it would be: TASK BACKBONE STORE DATA TOKENS LAYERS CODEC MAX_LENGTH PROMPT WORDS LIMIT SEED DEVICE SPLITS REUSE=1
	@$(BIN)/readcache plan $(call options,$(INPUTS) SPLITS) $(call flags,REUSE)

extract: install ## stage one, every split of the task: the same variables, DASK NO_WAIT=1
	@$(BIN)/readcache extract $(call options,$(INPUTS) SPLITS DASK) $(call flags,REUSE NO_WAIT)

train: install $(if $(filter tensorboard trackio,$(TRACK)),$(VENV)/.stamp-track) ## stage two, extracting first what is missing: the same, CELL HIDDEN POOL HEAD EPOCHS LR BATCH SEEDS TRACK LABEL CACHE NO_EXTRACT=1
	@$(BIN)/readcache train $(call options,$(INPUTS) $(TRAIN)) $(call flags,NO_EXTRACT NO_WAIT REUSE)

sweep: install $(if $(TRIALS),$(VENV)/.stamp-sweep) ## many heads in a few passes: GRID=grid.yaml, TRIALS (Optuna proposes), WIDTH; the variables of train
	@$(BIN)/readcache sweep $(call options,$(INPUTS) $(TRAIN) GRID TRIALS WIDTH) $(call flags,NO_EXTRACT NO_WAIT REUSE)

ablate: install ## READ beside its controls, from the same cache: the same variables, SEEDS=5
	@$(BIN)/readcache ablate $(call options,$(INPUTS) $(TRAIN)) $(call flags,NO_EXTRACT NO_WAIT REUSE)

evaluate: install ## scores of a saved run on a split: RUN TASK SPLIT STORE DEVICE BATCH
	@$(BIN)/readcache evaluate $(call options,$(OFRUN) BATCH)

predict: install ## labels for new text: RUN TEXT TEXT_PAIR, or FILE=in.jsonl, or SPLIT of the cache; STORE DEVICE BACKBONE
	@$(BIN)/readcache predict $(call options,$(OFRUN) TEXT TEXT_PAIR FILE BACKBONE)

catalog: install ## caches and runs under STORE
	@$(BIN)/readcache catalog $(call options,STORE)

verify: install ## every byte of caches compared with what was published: all, or CACHE; with TASK (and its variables) RECOMPUTE=100 examples too
	@$(BIN)/readcache verify $(call options,$(INPUTS) SPLITS CACHE RECOMPUTE)

repair: install ## damaged caches of a task mended: the variables of extract
	@$(BIN)/readcache repair $(call options,$(INPUTS) SPLITS)

explain: install ## in what two caches differ: A=3f2a B=91bc STORE
	@$(BIN)/readcache explain $(call quote,A) $(call quote,B) $(call options,STORE)

du: install ## what lies under STORE, and how large it is
	@$(BIN)/readcache du $(call options,STORE)

gc: install ## what nobody needs: STORE GRACE=7 (days), DELETE=1 does it
	@$(BIN)/readcache gc $(call options,STORE GRACE) $(call flags,DELETE)

pin: install ## hold a cache under a name: CACHE NAME WHY STORE
	@$(BIN)/readcache pin $(call options,$(COPIES) NAME WHY)

unpin: install ## let go of it: CACHE NAME STORE
	@$(BIN)/readcache unpin $(call options,$(COPIES) NAME)

push: install ## copy caches to another store, verified: CACHE (or all) TO STORE
	@$(BIN)/readcache push $(call options,$(COPIES) TO)

pull: install ## copy caches from another store, verified: CACHE (or all) SOURCE STORE
	@$(BIN)/readcache pull $(call options,$(COPIES) SOURCE)

report: install ## one HTML page and one Markdown file of all runs under STORE
	@$(BIN)/readcache report $(call options,STORE)

bench: $(VENV)/.stamp-bench ## the tables of the README: WHAT=extract, read, train, heads, codec (all five where left out), glue, recipes or store, DATA REPEATS …
	@$(BIN)/readcache bench $(WHAT) $(call options,$(INPUTS) $(TRAIN) ONLY REPEATS)

test: $(VENV)/.stamp-dev ## all tests, offline, on the CPU: ARGS="-k store"
	@$(BIN)/python -m pytest $(ARGS)

lint: $(VENV)/.stamp-dev ## style, types
	@$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy
