# Every target sets up what it needs: on a fresh clone each works alone.

PYTHON ?= python3
TIME ?= 600

PY := .venv/bin/python
STAMP := .venv/.stamp
COMPILED := .venv/.compiled
SERVERS := .venv-servers/.stamp
NODE_SERVERS := .venv-servers/.node-stamp
KINESALITE := kinesalite@3.3.3
PLUGINS := $(wildcard plugins/*)

CODE = $(foreach dir,src tests plugins benchmarks examples,$(if $(shell find $(dir) -name '*.py' 2>/dev/null | head -n 1),$(dir)))

.PHONY: setup demo test lint prove bench clean

setup: $(STAMP) $(SERVERS) $(NODE_SERVERS)

# By environment, not by -c, so that the pins hold for the build backend too (newer pips: the second name).
$(STAMP): pyproject.toml constraints.txt $(PLUGINS:%=%/pyproject.toml)
	@echo "setting up .venv (about a minute, once)"
	@$(PYTHON) -m venv .venv
	@PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_CONSTRAINT=constraints.txt PIP_BUILD_CONSTRAINT=constraints.txt \
		$(PY) -m pip install -qq -e '.[dev]' $(PLUGINS:%=-e './%[dev]')
	@touch $@

# The stand-ins for AWS that tests, demo and benchmarks start.
$(SERVERS): constraints-servers.txt
	@echo "setting up .venv-servers (half a minute, once)"
	@$(PYTHON) -m venv .venv-servers
	@PIP_DISABLE_PIP_VERSION_CHECK=1 .venv-servers/bin/python -m pip install -qq -r constraints-servers.txt
	@touch $@

# One more, where there is node: its tests are skipped where it is not, or where npm gets nothing.
$(NODE_SERVERS): $(SERVERS)
	@! { command -v node && command -v npm; } >/dev/null 2>&1 || npm install --silent --no-save --no-package-lock \
		--prefix .venv-servers/node $(KINESALITE) >/dev/null 2>&1 || echo "npm got no $(KINESALITE): its tests are skipped"
	@touch $@

demo: setup
	@$(PY) -m examples.demo

TESTS = PYTHONDONTWRITEBYTECODE= $(PY) -m pytest tests $(wildcard plugins/*/tests)

# With bytecode kept, whatever the environment says: each process would compile 400 files of tests each time.
test: setup $(COMPILED)
	@$(TESTS) -n 6 --dist worksteal

# And compiled by one process the first time, not by all of them at once. What is wrong the tests will tell.
$(COMPILED): $(STAMP)
	@$(TESTS) --collect-only -qq -n 0 >/dev/null 2>&1 || true
	@touch $@

lint: setup
	@$(PY) -m ruff check --quiet .
	@$(PY) -m ruff format --quiet --check .
	@$(PY) -m mypy --strict $(CODE)

# make prove TIME=600: more seeds, more kills, fuzzing, for that many seconds
prove: setup
	@$(PY) -m tests.prove --seconds $(TIME)

bench: setup
	@$(PY) -m benchmarks

clean:
	@rm -rf .venv .venv-servers .flowlane build dist .hypothesis .mypy_cache .pytest_cache .ruff_cache
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +
