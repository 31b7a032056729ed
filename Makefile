# Every target sets up .venv by itself and is quick when it exists.
PYTHON ?= python3
VENV := .venv
STAMP := $(VENV)/.installed
RUN := $(VENV)/bin/python

.PHONY: train test bench compat gpu lint clean

train: $(STAMP)
	$(RUN) -m fastkl.vae train $(ARGS)

# As many processes as there are cores, one thread each: most tests are of one thread whatever the machine has. Files in
# the order in which tests/conftest.py puts them, not by the number of their tests.
test: $(STAMP)
	OMP_NUM_THREADS=1 $(RUN) -m pytest --numprocesses auto --dist loadfile --no-loadscope-reorder $(ARGS)

bench: $(STAMP)
	$(RUN) -m bench $(ARGS)

# Every version of Triton and every target; only a whole run is written down, unless ARGS says so.
compat: $(STAMP)
	$(RUN) tests/compat.py $(or $(ARGS),--write)

gpu: $(STAMP)
	PYTHON="$(CURDIR)/$(RUN)" bash bench/gpu.sh $(ARGS)

lint: $(STAMP)
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy

$(STAMP): pyproject.toml constraints.txt
	test -x $(RUN) || $(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info
