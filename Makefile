# Two commands on a bare machine with Python >= 3.10: `make demo` and `make test`. Both make the environment once.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test quick check docs clean

demo: .venv/.ready  ## search, compare and save step schedules (the main job)
	$(BIN)/oss-exp

test: .venv/.ready  ## all tests
	$(BIN)/pytest -n 2 --dist worksteal --durations 40 --durations-min 5

quick: .venv/.ready  ## some tests of everything, within a minute and a half
	$(BIN)/pytest -n 2 --dist worksteal -m "not slow"

check: .venv/.ready docs  ## lint, format, import floors, types, documentation site
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports --no-logo
	$(BIN)/python .ci/type_errors.py

docs: .venv/.ready  ## the documentation site, in build/site
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

clean:  ## remove the environment and all outputs
	rm -rf .venv build outputs multirun

# k-diffusion is for tests: its samplers, without the ten libraries that the rest of it needs.
.venv/.ready: pyproject.toml .constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[dev]" -c .constraints.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps k-diffusion torchdiffeq -c .constraints.txt
	touch $@
