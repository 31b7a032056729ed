# Every target sets up .venv by itself and is quick when it exists.
PYTHON ?= python3
VENV := .venv
STAMP := $(VENV)/.installed
RUN := $(VENV)/bin/python

.PHONY: train test test-integrations conformance bench compat gpu lint clean

train: $(STAMP)
	$(RUN) -m fastkl.vae train $(ARGS)

# As many processes as there are cores, one thread each: most tests are of one thread whatever the machine has. Files in
# the order in which tests/conftest.py puts them, not by the number of their tests.
test: $(STAMP)
	OMP_NUM_THREADS=1 $(RUN) -m pytest --numprocesses auto --dist loadfile --no-loadscope-reorder $(ARGS)

# Against the libraries themselves, in an environment of their own: a gigabyte.
test-integrations: $(VENV)-integrations/.installed
	OMP_NUM_THREADS=1 $(VENV)-integrations/bin/python -m pytest tests/integrations $(ARGS)

# The tables of docs/conformance.md. That other libraries fail cases is no error here.
conformance: $(VENV)-integrations/.installed
	sed '/<!-- written by/q' docs/conformance.md > docs/conformance.new
	-$(VENV)-integrations/bin/python -W ignore -m fastkl.conformance --markdown >> docs/conformance.new
	echo '<!-- end -->' >> docs/conformance.new
	mv docs/conformance.new docs/conformance.md

$(VENV)-integrations/.installed: pyproject.toml constraints.txt
	test -x $(VENV)-integrations/bin/python || $(PYTHON) -m venv $(VENV)-integrations
	$(VENV)-integrations/bin/python -m pip install --quiet --constraint constraints.txt --editable ".[integrations]"
	touch $@

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
	test -e fastkl/kernels || ln -s ../kernels fastkl/kernels  # mypy looks for packages only where their names say
	$(RUN) -m mypy

$(STAMP): pyproject.toml constraints.txt
	test -x $(RUN) || $(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $@

clean:
	rm -rf $(VENV) $(VENV)-integrations build dist *.egg-info
