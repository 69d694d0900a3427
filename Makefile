# Everything a fresh machine needs: `make quickstart` and `make test` create the virtual environment themselves.
VENV ?= .venv
PYTHON ?= python3
RUN := $(VENV)/bin/python
# The quickstart and the tests never need a network; offline mode makes sure of it.
OFFLINE := HF_HUB_OFFLINE=1

.PHONY: install quickstart test test-fast test-gpu test-versions test-oldest test-newest lint docs dist release-files release-check

install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --disable-pip-version-check --constraint constraints.txt --editable ".[dev]"
	@touch $@

quickstart: $(VENV)/.installed
	$(OFFLINE) $(RUN) pipeline/run.py recipes/quickstart.yaml

test: $(VENV)/.installed
	$(OFFLINE) $(RUN) -m pytest --numprocesses auto --dist loadfile

test-fast: $(VENV)/.installed
	$(OFFLINE) $(RUN) -m pytest -m "not slow" --numprocesses auto --dist loadfile

# What only a GPU can show, on the first one.
test-gpu: $(VENV)/.installed
	$(OFFLINE) CUDA_VISIBLE_DEVICES=$${CUDA_VISIBLE_DEVICES:-0} ACCELERATE_USE_CPU=false $(RUN) -m pytest tests/test_gpu.py -ra --numprocesses 6

# The fast tests once more, with the oldest and with the newest libraries that pyproject.toml allows.
test-versions: test-oldest test-newest

test-oldest test-newest: test-%: .venv-%/.installed
	$(OFFLINE) .venv-$*/bin/python -m pytest -m "not slow" --numprocesses auto --dist loadfile

.venv-oldest/.installed .venv-newest/.installed: .venv-%/.installed: pyproject.toml tests/versions/%.txt
	$(PYTHON) -m venv .venv-$*
	.venv-$*/bin/python -m pip install --disable-pip-version-check --constraint tests/versions/$*.txt --editable ".[dev]"
	@touch $@

lint: $(VENV)/.installed
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .

docs: $(VENV)/.installed
	$(RUN) -m pip install --disable-pip-version-check --quiet --constraint constraints.txt --editable ".[docs]"
	$(RUN) -m tools.recipe_reference
	$(RUN) -m mkdocs build --strict

# The wheel: the package, its recipes and the sentences of the quickstart, in dist/.
dist: $(VENV)/.installed
	$(RUN) -m pip wheel --disable-pip-version-check --no-deps --wheel-dir dist .

# What a release consists of: the sdist, the wheel that is built from it, their metadata, and versions that agree.
release-files: $(VENV)/.installed
	$(RUN) -m pip install --disable-pip-version-check --quiet --constraint constraints.txt --editable ".[release]"
	rm -rf build/release
	$(RUN) -m build --outdir build/release
	$(RUN) -m twine check --strict build/release/*
	$(RUN) -m tools.release_check build/release

# The whole list before a release, the quick parts first.
release-check: lint docs release-files test test-versions
