# make run | test | test-all | test-portable | faults | lint | format | app | mlflow | experiments | board | refresh | lock | clean. Needs Python 3.11 to 3.13 with venv, make and git; nothing else.

PYTHON ?= python3
VENV := .venv
PORT ?= 5000
# By each of two signals, of each of nine stages and of each of five processes under Prefect.
KILLS ?= 5

# Nothing calls home. What runs here uses the venv's programs, whatever is activated.
export PATH := $(CURDIR)/$(VENV)/bin:$(PATH)
export DVC_NO_ANALYTICS := 1
export GX_ANALYTICS_ENABLED := false
export DO_NOT_TRACK := 1
export MLFLOW_DISABLE_TELEMETRY := true
export PREFECT_SERVER_ANALYTICS_ENABLED := false
export PYTHONUTF8 := 1

# A terminal shows what is being fetched; a log stays short.
QUIET := $(shell [ -t 2 ] || echo --quiet)

# Where Python may keep no compiled modules, each stage would compile TensorFlow's and MLflow's anew.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: run test test-all test-portable faults lint format app mlflow experiments board refresh lock clean setup
.DEFAULT_GOAL := run

run: setup  ## photos to a registered classifier, then a short table
	@touchline registry sync
	@touchline ingest --check
	@dvc --wait-for-lock repro
	@touchline summary

test: setup  ## every feature once for real, about 10 minutes on two cores: before each commit
	@python -m pytest -n 3 --dist loadgroup --no-loadscope-reorder -m "not slow"

test-all: setup  ## the slow tests too, about half an hour: before a release
	@python -m pytest -n 2 --dist loadgroup --no-loadscope-reorder

test-portable: setup  ## the tests as on one core of a processor without wide vectors; TESTS="tests/test_train.py" for some
	@python tests/plain_processor.py --timeout=1800 $(TESTS)

faults: setup  ## kill every stage at random moments, damage files, fill disks, lock stores, feed hostile bytes; ends with a table
	@echo "this takes over an hour on two cores; a table at the end shows the results"
	@TOUCHLINE_FAULTS=1 TOUCHLINE_KILLS=$(KILLS) TOUCHLINE_FUZZ_CASES=2000 python -m pytest -q -n 2 --dist loadgroup --timeout=1800 \
		--no-loadscope-reorder tests/test_pipeline_killed.py tests/test_flows_killed.py tests/test_fuzz.py tests/test_faults.py \
		tests/test_ingest_faults.py tests/test_team.py tests/test_load.py tests/test_security.py

app: setup  ## a page to try the models on photos and correct their answers, until Ctrl-C
	@touchline registry sync
	@touchline app $(APP)

mlflow: setup  ## the MLflow UI on the project's store
	@touchline registry sync
	@touchline mlflow --port $(PORT)

# Leaves out dates and digests of files, so that the table fits a terminal of 80 characters.
experiments: setup  ## DVC's experiments: each model's accuracy on the test photos, and the params that differ
	@dvc exp show --only-changed --keep 'test\.' --drop '(data|models|reports|src)(/|$$)|validation\.|Created'

board: setup  ## the Prefect UI, a worker for the schedules, the MLflow UI and the reports, until Ctrl-C
	@touchline registry sync
	@python -m flows.board $(BOARD)

refresh: setup  ## look for new photos where DVC cannot see them, then update everything
	@touchline ingest --check
	@TOUCHLINE_REFRESH=1 dvc --wait-for-lock repro --force --single-item ingest
	@dvc --wait-for-lock repro
	@touchline summary

lint: setup  ## check style, types and security; changes nothing
	@ruff check .
	@ruff format --check .
	@bandit --quiet --configfile pyproject.toml --recursive src flows
	@mypy

format: setup  ## fix and format what ruff can
	@ruff check --fix . && ruff format .

# No index address goes into the lock; --universal makes it one for every Python and system.
lock: setup  ## rewrite requirements.lock from pyproject.toml
	@uv pip compile --quiet --universal --generate-hashes --no-emit-index-url --no-header --group dev \
		--extra app --extra c2pa --extra onnx --extra dask --extra team --python-version 3.11 pyproject.toml --output-file requirements.lock

setup: $(VENV)/.installed
	@[ -e .git ] || grep -qs no_scm .dvc/config.local || dvc config --local core.no_scm true

$(VENV)/.installed: requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' || \
		{ echo "touchline needs Python 3.11 to 3.13, and $(PYTHON) is `$(PYTHON) --version 2>&1`: make PYTHON=python3.11"; exit 2; }
	@[ -x $(VENV)/bin/python ] || $(PYTHON) -m venv $(VENV)
	@echo "installing the pinned packages into $(VENV), once: 4 GB on disk, one to five minutes by the connection"
# uv is pinned by the same lock; it installs this set in seconds where pip takes minutes.
	@sed -n '/^uv==/,/[^\\]$$/p' requirements.lock > $(VENV)/uv.lock
	@python -m pip install --quiet --disable-pip-version-check --require-hashes -r $(VENV)/uv.lock
	@uv pip sync $(QUIET) --compile-bytecode --require-hashes requirements.lock
	@uv pip install --quiet --no-deps --no-build-isolation --editable .
	@touch $@

clean:  ## start over: delete models, reports, data/photos, data/features and data/*.csv; DVC's cache, the MLflow store and your decisions stay
	@rm -rf data/photos data/features $(filter-out data/decisions.csv data/forgotten.csv,$(wildcard data/*.csv)) data/croissant.json models reports
