# Makes the environment once and again only when what it is made from has changed.
#   make train   train the embedded default         make test    run the tests
#   make lint    run the linters                    make clean   remove what was built, not the environment

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
SOURCES := $(sort $(shell find csrc -type f))

.PHONY: install train test lint clean

train: install
	PATH="$(CURDIR)/$(BIN):$$PATH" deepspeed train.py --config zero3.json

# each file in one of as many processes as there are cores, one thread each: most tests wait for the interpreter, and
# those that start processes need the compiled modules
test: install
	PYTHONDONTWRITEBYTECODE= OMP_NUM_THREADS=1 $(BIN)/pytest --numprocesses auto --dist loadfile --no-loadscope-reorder

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

install: $(VENV)/.installed

# torch first: deepspeed and the native extension look for it when they are built, and an isolated build of the
# latter would fetch a second one
$(VENV)/.installed: pyproject.toml constraints.txt setup.py $(SOURCES)
	test -x $(BIN)/python || "$(PYTHON)" -m venv $(VENV)
	$(PIP) setuptools wheel ninja numpy torch triton
	$(PIP) --no-build-isolation -e '.[test]'
	touch $@

clean:
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache prismer/_C*.so $(VENV)/.installed
	find . -path ./$(VENV) -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +
