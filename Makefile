# Two commands need nothing before them: `make demo` and `make test`. `make help` lists the rest.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

PYTHON ?= python3
# A plain `torch` pulls gigabytes of CUDA; on a machine with GPUs: make setup TORCH=torch
TORCH ?= torch==2.13.0

JOB ?= deepseek-v4-pro
NODES ?=
MP ?=
ON ?=
SITE ?=
SET ?=

DSQJOB := .venv/bin/dsqjob
# A site's profile: a name in slurm/, or a path
PROFILE = $(if $(findstring /,$(SITE)),$(abspath $(SITE)),$(CURDIR)/slurm/$(SITE).yaml)
OVERRIDES = $(if $(SITE),--set 'profile=$(PROFILE)') $(if $(NODES),--nodes $(NODES)) $(if $(MP),--mp $(MP)) $(if $(ON),--on $(ON)) $(foreach s,$(SET),--set '$(s)')
UNIT := tests/architecture tests/checkpoint tests/engine tests/formats tests/amax tests/job tests/miniature tests/tokens tests/verify
WHOLE := tests/cli tests/pipeline tests/faults tests/documents tests/slurm
# Rooms with contracts of seconds, or gangs that take every core
ALONE := tests/gang tests/calibration tests/kills tests/slurm_gangs
SHARED := -n auto --maxprocesses 8 --dist worksteal
LONG := tests/slurm_long
SLURM_PACKAGES := slurmctld slurmd slurm-client munge slurm-wlm-basic-plugins slurmdbd slurm-wlm-mysql-plugin \
  mariadb-server-core mariadb-client-core
SYSTEM_PACKAGES := strace $(SLURM_PACKAGES)

.PHONY: help setup demo lint check test test-all test-gpu bench clean tokens-v4 convert-v4 calibrate-v4 export-v4 verify-v4 pipeline-v4 system-packages

help: ## this list
	@grep -E '^[a-z0-9-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

setup: .venv/.ready .venv-base/.ready ## make .venv (everything) and .venv-base (no torch)

.venv/.ready: pyproject.toml
	@tests/setup-venv .venv "$(PYTHON)" '$(TORCH)' '.[worker,dev]'

.venv-base/.ready: pyproject.toml
	@tests/setup-venv .venv-base "$(PYTHON)" '' '.'

demo: setup ## the whole job, end to end, on a miniature release
	@tests/demo $(DSQJOB) .demo

lint: setup ## style, types, layers
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy
	.venv/bin/lint-imports
	.venv/bin/shellcheck .ci/run tests/setup-venv tests/demo tests/system-packages
	.venv/bin/yamllint --strict .

check: lint ## lint, then unit tests (under 3 minutes)
	.venv/bin/pytest -q $(SHARED) $(UNIT)

test: lint system-packages ## lint, unit tests, whole jobs, faults and README (half an hour on 2 cores)
	.venv/bin/pytest -q $(SHARED) $(UNIT) $(WHOLE)
	.venv/bin/pytest -q $(ALONE)

test-all: test bench ## the same, the slowest cases of Slurm, and the benchmarks: twenty minutes more
	.venv/bin/pytest -q $(LONG)

test-gpu: setup ## on a machine with GPUs (first: make setup TORCH=torch): NCCL gangs, CPU against GPU, real geometry
	.venv/bin/pytest -s -q tests/gpu

bench: setup ## ratios, side by side, printed
	.venv/bin/python -m tests.benchmarks

system-packages:
	@tests/system-packages $(SYSTEM_PACKAGES)

clean: ## remove what make made here
	rm -rf .demo .venv .venv-base .mypy_cache .pytest_cache .ruff_cache .hypothesis dsqjob.egg-info

tokens-v4: setup ## calibration text -> token ids; where there is network, for named data sets. JOB= SET="k=v ..."
	$(DSQJOB) run $(JOB) --stage tokens $(OVERRIDES)

calibrate-v4: setup ## release + tokens -> amax, by a gang of MP ranks. JOB= NODES= MP= ON=local|slurm SITE= SET=
	$(DSQJOB) run $(JOB) --through calibrate $(OVERRIDES)

convert-v4: setup ## release -> model-parallel checkpoint. JOB= NODES= MP= ON=local SET="k=v ..."
	$(DSQJOB) run $(JOB) --stage convert $(OVERRIDES)

export-v4: setup ## release + amax -> finished NVFP4 checkpoint. JOB= SET=
	$(DSQJOB) run $(JOB) --stage export --through finalize $(OVERRIDES)

verify-v4: setup ## check a checkpoint bit by bit. JOB= SET=
	$(DSQJOB) verify $(JOB) $(OVERRIDES)

pipeline-v4: setup ## everything that is not done yet. JOB= NODES= MP= ON=local SET=
	$(DSQJOB) run $(JOB) --through verify $(OVERRIDES)
