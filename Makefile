SHELL := bash
.DEFAULT_GOAL := help
PRESET ?= gemma3-12b-t4
# Empty takes the preset's own data.path (data/dataset.json for the 12B).
DATA ?=
ARGS ?=
PY := .venv/bin/python
TRAINER := $(PY) -m trainer
# What stands between apostrophes: a name may hold blanks and apostrophes.
QUOTED := $(subst ','\'',$(DATA))
WITH := --preset $(PRESET) $(if $(DATA),--set 'data.path=$(QUOTED)') $(ARGS)

.PHONY: help doctor pin setup setup-server lock check check-locks format test test-gpu e2e soak soak-fresh demo bench-demo bench-gpu smoke-t4 plan train report push serve key clean release up down logs chat smoke

help:  ## this list
	@sed -n 's/^\([a-z0-9-]*\):[^#]*## /\1\t/p' $(MAKEFILE_LIST) | while IFS=$$'\t' read -r name does; do printf '  make %-13s %s\n' "$$name" "$$does"; done
	@echo "  PRESET=$(PRESET)  DATA=FILE of your records  ARGS='--set section.key=value'"

doctor:  ## is this machine ready for PRESET? each line with its remedy; works before make setup
	@if [ -f .venv/.ready ]; then $(TRAINER) doctor $(WITH); else python3 -m trainer.doctor $(WITH); fi

setup:  ## .venv from the locks, with the torch that suits this machine
	@requirements/setup.sh

setup-server:  ## .venv-server: only what serving needs, no torch
	@requirements/setup.sh server

demo: setup  ## train, export, verify and serve Gemma 3 270M on the sample data: no card, no account
	@$(PY) -m bench.demo

plan: setup  ## say whether a run of PRESET fits its card, term by term
	@$(TRAINER) plan $(WITH)

train:  ## the whole way with PRESET and DATA: on this host, else in a container; IN=host or IN=container decides it
	@IN=$(IN) docker/train $(PRESET) '$(QUOTED)' $(ARGS)

report: setup  ## bring PRESET's report.html up to date
	@$(TRAINER) report $(WITH)

REPO ?=
WHAT ?= gguf

push: setup  ## PRESET's release to the model hub: REPO=owner/name, WHAT=gguf|adapter; private unless PUBLIC=1; DRY=1 only lists
	@$(TRAINER) push "$(REPO)" --what $(WHAT) $(if $(PUBLIC),--public) $(if $(DRY),--dry-run) $(WITH)

release: setup  ## prepare to release with PRESET and DATA, without the report; what `make up` started then serves it
	@$(TRAINER) release $(WITH)

serve: setup  ## serve the newest release on http://127.0.0.1:8080
	@$(PY) -m server $(ARGS)

up:  ## Ollama, loader and gateway in containers: the newest release on http://127.0.0.1:8080
	@docker/compose up $(ARGS)

down:  ## stop them; nothing is lost (ARGS=-v deletes the volumes: loaded models, keys, the trainer's cache)
	@docker/compose down $(ARGS)

logs:  ## what they say, until Ctrl-C
	@docker/compose logs --follow --tail 100 $(ARGS)

chat:  ## talk in the terminal with what `make up` or `make serve` started
	@docker/chat $(ARGS)

smoke:  ## does what `make up` brought answer, and only to whom it should?
	@docker/smoke

key: setup  ## make an API key; make -s key prints just the key
	@$(PY) -m server key $(ARGS)

check: setup  ## format, lint, types, locks, known vulnerabilities where their data can be had
	$(PY) -m ruff format --check
	$(PY) -m ruff check
	$(PY) -m mypy
	@$(MAKE) --no-print-directory check-locks
	@UV=$$(requirements/setup.sh uv) $(PY) requirements/audit.py

check-locks:  ## whether requirements/*.txt are what pyproject.toml asks for
	UV=$$(requirements/setup.sh uv) requirements/lock.sh --check

format: setup  ## let ruff mend what it can
	$(PY) -m ruff format
	$(PY) -m ruff check --fix

pin:  ## write the digests of images and the commits of models beside their names, where registries and hub can be reached
	@python3 requirements/pin.py

lock: setup  ## renew requirements/*.txt from pyproject.toml; UPGRADE=1 takes the newest versions
	UV=$$(requirements/setup.sh uv) requirements/lock.sh

test: setup  ## the tests that need no card and no trained model
	$(PY) -m pytest -m "not e2e and not gpu and not slow" $(ARGS)

test-gpu: setup  ## the tests that need an NVIDIA card
	$(PY) -m pytest -m gpu $(ARGS)

e2e: demo  ## the tests that start from the demo's release
	$(PY) -m pytest -m e2e $(ARGS)

soak: setup  ## 500 kills of a train, 100 of an export, 15 minutes of chaos under the gateway; goes on where it stopped
	$(PY) -m bench.soak --case train_kills --trials 500 $(ARGS)
	$(PY) -m bench.soak --case export_kills --trials 100 $(ARGS)
	$(PY) -m bench.soak --case gateway_chaos --seconds 900 --at-least 100 $(ARGS)
	@if docker info >/dev/null 2>&1; then $(MAKE) --no-print-directory soak-fresh; else echo "soak: no Docker answers: soak-fresh is left out"; fi

soak-fresh:  ## with no cache at all: make demo and make test in a bare container, then the trainer's image; part of soak where Docker answers
	rm -rf output/soak/fresh
	CACHE=none .ci/fresh-clone output/soak/fresh demo test
	TRAINER_BASE_IMAGE=$${TRAINER_BASE_IMAGE:-$$BASE_IMAGE} BUILD_NETWORK=host $(or $(COMPOSE),docker compose) --profile train build --no-cache trainer

bench-demo: setup  ## the demo from nothing, as a row of bench/results/demo.jsonl
	$(PY) -m bench.demo --record

MODEL ?= .cache/random-12b
CAP := 15600000000
RUN := $(or $(RUN),$(shell date -u +%Y%m%d-%H%M%S))
STEP = $(PY) -m bench.qdora_step --model $(MODEL) --run $(RUN)
ROOF = $(PY) -m bench.t4_roofline --model $(MODEL) --run $(RUN)
NOTHING_KEPT := --keep-bytes 0 --keep-pinned-bytes 0

bench-gpu: setup  ## a step of the 12B on this card, ours and unsloth's, as rows of bench/results/ (what a card cannot do goes by)
	@[ -f $(MODEL)/config.json ] || $(PY) -m trainer.random_weights $(MODEL) --size 12b --device cuda
	-$(STEP) --who unsloth
	-$(STEP) --who unsloth --mode bf16
	-$(STEP) --cap-bytes $(CAP) $(NOTHING_KEPT) --kernels docs/kernels_of_a_step.json
	-$(STEP) --cap-bytes $(CAP)
	-$(STEP) --mode bf16
	-$(STEP) --tokens 16384 --cap-bytes $(CAP) $(NOTHING_KEPT)
	-$(STEP) --tokens 24576 --steps 10 --cap-bytes $(CAP) $(NOTHING_KEPT) --set kernels.span_layers=2 --set kernels.pin_gradients=true
	-$(STEP) --mixed packed --steps 100 --cap-bytes $(CAP)
	-$(STEP) --mixed unpacked --steps 100 --cap-bytes $(CAP)
	-$(ROOF) --who unsloth
	-$(ROOF) --cap-bytes $(CAP)

smoke-t4: setup  ## three real steps of the 12B on this machine's card: bytes, seconds, and a row to send back
	@$(PY) -m bench.smoke_t4 $(ARGS)

clean:  ## remove environments and tools' caches; output/, data/ and .cache/ stay
	rm -rf .venv .venv-server .tools .mypy_cache .pytest_cache .ruff_cache *.egg-info
