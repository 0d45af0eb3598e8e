# `make demo` and `make test` set up what they need and work as the first command in a clone.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# Where there is no NVIDIA driver the CPU build of torch saves gigabytes. A wheel that pip finds on
# disk (PIP_FIND_LINKS) comes first, then PyTorch's index of CPU builds, then PyPI.
TORCH_CPU ?= torch==2.13.0
TORCH_CPU_INDEX ?= https://download.pytorch.org/whl/cpu
DEMO_OUTPUT ?= output/demo
# Each test process computes on one core; the files that start Ray follow each other in one of them.
TEST_PROCESSES ?= 2

export RAY_USAGE_STATS_ENABLED := 0

.PHONY: demo images docs test test-long test-browser chaos chaos-long test-slow check format wheel bench clean

demo: $(STAMP)
	$(BIN)/zimage run jobs/avatars.yaml --config configs/z-image-tiny.yaml \
		--count 24 --workers 2 --output $(DEMO_OUTPUT)
	$(BIN)/python -m jobs.contact_sheet $(DEMO_OUTPUT) $(DEMO_OUTPUT).png

# The pictures of the documents, made anew: when the tiny checkpoint or what it draws has changed.
images: $(STAMP)
	for name in avatars food gaming; do \
		$(BIN)/zimage run jobs/$$name.yaml --config configs/z-image-tiny.yaml --count 24 --workers 2 \
			--output output/images/$$name || exit 1; \
		$(BIN)/python -m jobs.contact_sheet output/images/$$name docs/images/$$name.webp || exit 1; \
	done

# The documents as a site, in output/site; a link or an anchor that leads nowhere is an error. The
# variable is for an advertisement that the theme prints.
docs: $(STAMP)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --config-file .mkdocs.yml

test: $(STAMP)
	$(BIN)/python -m pytest -n $(TEST_PROCESSES)

# What `make test` leaves out first: whole jobs, trained checkpoints and memory, seconds for each test.
test-long: $(STAMP)
	$(BIN)/python -m pytest -n $(TEST_PROCESSES) -m 'long and not slow and not chaos' \
		$$(grep -rlF mark.long --include='*.py' tests)

# What needs the machine for itself: a cluster whose processes are killed, on disk and on S3, and a job whose
# samples kill, hang and fill their workers, or whose nodes cannot load.
chaos: $(STAMP)
	$(BIN)/python -m pytest -m chaos tests/chaos tests/jobs/test_failure_classes.py \
		tests/jobs/test_nodes_left_aside.py

# Seeds until the results hold so many kills; goes on where it was stopped. About 8 kills a minute.
CHAOS_KILLS ?= 200
chaos-long: $(STAMP)
	PYTHONPATH=tests/support:. OMP_NUM_THREADS=1 $(BIN)/python -m chaos_run --kills $(CHAOS_KILLS) \
		--results output/chaos/long.jsonl $(CHAOS_FLAGS)

# The gallery page in Chromium (Debian: chromium and chromium-driver); without it these are skipped.
test-browser: $(STAMP)
	$(BIN)/python -m pytest -m browser tests/jobs/test_gallery_page.py

test-slow: $(STAMP)
	$(BIN)/python -m pytest -m slow

check: $(STAMP)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(STAMP)
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

wheel: $(STAMP)
	rm -rf dist
	$(BIN)/python -m build --wheel --outdir dist

bench: $(STAMP)
	@for file in tests/benchmarks/bench_*.py; do echo "== $$file"; $(BIN)/python $$file || exit 1; done

clean:
	rm -rf $(VENV) dist build .mypy_cache .ruff_cache .pytest_cache .import_linter_cache

$(STAMP): pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed" if sys.version_info < (3, 11) else 0)'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@if ! $(BIN)/python -c 'import torch' 2>/dev/null && ! command -v nvidia-smi >/dev/null; then \
		echo 'no NVIDIA driver: installing the CPU build of torch'; \
		$(BIN)/pip install -q --no-index --no-deps "$(TORCH_CPU)" 2>/dev/null \
		|| $(BIN)/pip install -q --index-url "$(TORCH_CPU_INDEX)" "$(TORCH_CPU)" \
		|| true; \
	fi
	$(BIN)/pip install -q -e '.[test]'
	touch $@
