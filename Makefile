# Two commands do everything: `make serve` and `make test`. All they install goes into .venv, but for what tests need of
# the system (tests/system_packages.py), which root gets by apt-get.
PYTHON ?= python3
BIN := .venv/bin
PYTRITON := nvidia-pytriton==0.7.0
CHECKOV := checkov==3.3.30

.PHONY: help serve test test-export test-outside check k8s-check faults bench format generate clean

help:
	@echo "make serve   a real Triton on the CPU, the bundled sam-tiny model, and the gateway"
	@echo "make test    every check and every test"
	@echo "make check   format, lint, types, layers, generated files, unit tests"
	@echo "make k8s-check  images, manifests, rules and dashboard, against real tools (part of make test)"
	@echo "make faults  injects every fault and prints what was promised beside what was measured (long)"
	@echo "make bench   what a prompt costs, beside what people use today: tables and plots in out/bench (some minutes)"

serve: .venv/.serve
	@exec $(BIN)/python -m service --embedded

# Tests that no load disturbs run in two halves at once; the others have the machine to themselves.
EXPORT := tests/export
OUTSIDE := tests/browser tests/container tests/k8s
test: check
	$(MAKE) --no-print-directory --jobs=2 --output-sync test-export test-outside
	$(BIN)/python -m pytest $(addprefix --ignore=,tests/unit $(EXPORT) $(OUTSIDE))

test-export: .venv/.test
	$(BIN)/python -m pytest $(EXPORT)

test-outside: .venv/.test
	$(BIN)/python -m pytest $(OUTSIDE)

check: .venv/.test
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(MAKE) --no-print-directory generate OUT=.venv/generated
	diff -r -x __init__.py -x __pycache__ service/rpc/pb .venv/generated/service/rpc/pb
	$(BIN)/python -m export repository --check
	$(BIN)/python -m pytest tests/unit

# checkov has a hundred requirements, some older than the service's: it gets a virtual environment of its own. That takes
# a minute, so `make test` has it only where it is already, and in CI.
ifeq ($(CI),true)
test: .venv/checkov/bin/checkov
endif

k8s-check: .venv/.test .venv/checkov/bin/checkov
	$(BIN)/python -m pytest tests/k8s tests/container

faults: .venv/.test
	$(BIN)/python -m pytest tests/faults --full

# The short forms; each program has a long one, and benchmarks/ has more programs. An idle machine gives figures to keep.
BENCH := out/bench
bench: .venv/.bench
	$(BIN)/python -m benchmarks.budget --quick --csv $(BENCH)
	$(BIN)/python -m benchmarks.peers --quick --csv $(BENCH)
	$(BIN)/python -m benchmarks.load --quick --csv $(BENCH)
	$(BIN)/python -m benchmarks.scale --quick --csv $(BENCH)
	$(BIN)/python -m benchmarks.report $(BENCH)

format: .venv/.test
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# Files made from others: the protobuf modules from the .proto. (The model repository: `python -m export repository`.)
OUT ?= .
generate: .venv/.test
	@rm -rf .venv/generated && mkdir -p $(OUT)/service/rpc/pb
	$(BIN)/python -m grpc_tools.protoc -Iservice/rpc/pb=service/rpc \
		--python_out=$(OUT) --pyi_out=$(OUT) --grpc_python_out=$(OUT) service/rpc/pb/segment_anything.proto

# pytriton's own requirements (numpy < 2 among them) are for its Python API; only the server it carries is used.
.venv/.serve: pyproject.toml constraints.txt
	@test -d .venv || $(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --no-compile -c constraints.txt -e '.[serve,cpu]'
	$(BIN)/pip install --quiet --no-compile --no-deps $(PYTRITON)
	@touch $@

.venv/.test: .venv/.serve
	$(BIN)/pip install --quiet --no-compile -c constraints.txt -e '.[serve,cpu,otel,export,test]'
	@touch $@

.venv/checkov/bin/checkov: .venv/.serve
	@$(BIN)/python -m venv .venv/checkov
	.venv/checkov/bin/pip install --quiet --no-compile $(CHECKOV)

.venv/.bench: .venv/.test
	$(BIN)/pip install --quiet --no-compile -c constraints.txt -e '.[serve,cpu,otel,export,test,bench]'
	@touch $@

clean:
	rm -rf .venv .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
