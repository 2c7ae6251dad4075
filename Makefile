# make demo, make test: from a bare machine with python3 (3.10 to 3.12), pip and make. Set-up happens once, in .venv.
PYTHON ?= python3
BIN := .venv/bin

.DEFAULT_GOAL := help
.PHONY: help demo web test test-slow test-gpu test-web lint format bench bench-check experiments docs clean

help:            ## show this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/' | expand -t 14

.venv/.installed: requirements.txt
	$(PYTHON) -c 'import sys; sys.exit(None if (3, 10) <= sys.version_info[:2] <= (3, 12) else "error: Python 3.10 to 3.12 is needed, this is %d.%d; choose another with make PYTHON=python3.11" % sys.version_info[:2])'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --disable-pip-version-check -q -r requirements.txt
	touch $@

demo: .venv/.installed   ## 11 stitched ratios of the bundled emoji models -> figures/demo
	$(BIN)/python dit/sample_t_stitch.py --preset emoji --all_tradeoffs --save_dir figures/demo

web: .venv/.installed   ## the web page, on this machine
	$(BIN)/python sd/gradio_demo.py

test: .venv/.installed   ## the tests, a few minutes
	$(BIN)/python -m pytest -q

test-slow: .venv/.installed   ## the tests that take minutes
	$(BIN)/python -m pytest -q -m slow

test-gpu: .venv/.installed   ## the tests that need a CUDA device
	$(BIN)/python -m pytest -q -m gpu

test-web: .venv/.installed   ## the tests of the web page in a Chromium, which apt installs where there is none
	@command -v chromedriver >/dev/null || { command -v apt-get >/dev/null && { [ $$(id -u) = 0 ] || sudo=sudo; \
		$$sudo apt-get update -q && $$sudo apt-get install -qy --no-install-recommends chromium chromium-driver; }; } \
		|| { echo "error: install Chromium and chromedriver first"; exit 1; }
	$(BIN)/python -m pytest -q -m web tests/test_web.py

lint: .venv/.installed   ## ruff and mypy: style, format, types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: .venv/.installed   ## let ruff mend what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: .venv/.installed   ## the benchmarks in their quick form -> benchmarks/results
	$(BIN)/python benchmarks/bench.py

bench-check: .venv/.installed   ## the same, compared with the recorded ratios: names what fell by more than 10 %
	$(BIN)/python benchmarks/bench.py --check

experiments: .venv/.installed   ## every experiment on the emoji models again -> EXPERIMENTS.md: about an hour and a half on two cores
	$(BIN)/python experiments/run.py

docs: .venv/.installed   ## API pages -> docs/api
	$(BIN)/python -m pip install --disable-pip-version-check -q "$$(grep -o 'pdoc==[0-9.]*' requirements.txt)"
	$(BIN)/python -W ignore -m pdoc --docformat google --output-directory docs/api tstitch dit sit ldm sd

clean:           ## remove caches and .venv
	rm -rf .venv .pytest_cache .ruff_cache .mypy_cache
