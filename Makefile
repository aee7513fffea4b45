# The two commands: `make run` shows the whole thing on this machine, `make test` proves it.
PYTHON := .venv/bin/python
FAST := not slow
# onnxruntime's telemetry is on by default; nothing that we start may have it.
export ORT_DISABLE_TELEMETRY := 1
LOCK := --universal --python-version 3.11 --generate-hashes --no-header --no-annotate --no-emit-find-links --no-emit-index-url

.PHONY: run test spire chaos kills check setup bundle docs bench simulate bench-peers lock clean

run: setup bundle ## a broker, a software TPM, a cloud, a region and DEVICES=1 devices read shelf labels; RUN_FOR=60 stops by itself
	@$(PYTHON) -m appliance lab

test: setup ## everything, on real parts; where Go is, the first run builds SPIRE for the tests, about ten minutes
	@! command -v go >/dev/null || scripts/build-spire >/dev/null || true
	@$(PYTHON) -m pytest -rs

spire: setup ## ten minutes under load on real SPIRE with identities that last 60 s, and its faults; docs/spire.md
	@scripts/build-spire >/dev/null
	@SPIRE_MINUTES=10 $(PYTHON) -m pytest -s tests/fleet/test_spire.py

chaos: setup ## a fleet at peak load is broken on purpose, and every promise is counted: about 8 minutes, as root; docs/chaos.md
	@$(PYTHON) -m tests.chaos.run

kills: setup ## ROUNDS=200 times kill -9 of device, broker or region under a load of promises, each counted at the end: about 4 minutes; docs/chaos.md
	@ROUNDS=$(or $(ROUNDS),200) $(PYTHON) -m tests.kills.run

check: setup ## format, lint, types, house rules, fast tests: under 90 s
	@.venv/bin/ruff format --check --quiet . && .venv/bin/ruff check --quiet .
	@.venv/bin/lint-imports --no-logo >build/lint-imports.log || { cat build/lint-imports.log; exit 1; }
	@.venv/bin/mypy
	@EXAMPLES=25 $(PYTHON) -m pytest -m "$(FAST)"

docs: setup ## regenerate what docs/ holds that is generated: state diagrams, the table of settings
	@UPDATE_DOCS=1 $(PYTHON) -m pytest tests/core/serve/test_diagrams.py tests/test_docs.py

bench: setup ## benchmarks of the pieces and of a whole device; figures in build/reports
	@for bench in tests/bench/bench_*.py; do $(PYTHON) $$bench || exit 1; done

simulate: setup ## SEEDS=10000 fleets on virtual time, each with its own faults; a failing one prints how to replay it
	@$(PYTHON) tests/bench/bench_simulation.py --seeds $(or $(SEEDS),10000)

bench-peers: setup ## a whole device and the servers that people use instead, in one run (docs/bench.md); installs them into build/peers
	@$(PYTHON) tests/bench/peers/install.py
	@$(PYTHON) tests/bench/bench_serve.py --peers

lock: ## renew requirements*.txt from pyproject.toml (needs uv)
	uv pip compile pyproject.toml $(LOCK) -o requirements.txt
	uv pip compile pyproject.toml --group dev -c requirements.txt $(LOCK) -o requirements-dev.txt

clean: ## remove the lab's state, reports and the virtual environment
	@rm -rf build .venv

bundle: setup
	@scripts/build-variants

setup:
	@mkdir -p build/reports
	@scripts/setup
