# Every command sets up what it needs: a virtual environment with the tested versions, and a Jupyter kernel in it.
PYTHON ?= python3
VENV   ?= .venv
PRESET ?= mini
ARGS   ?=
BIN     = $(VENV)/bin
READY   = $(VENV)/.ready
export PYTHONWARNINGS = ignore::FutureWarning

.PHONY: help setup reproduce evaluate metastep published tune test notebooks export readme docs test-browser lab benchmark gpu-check clean
help:            ## what there is
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## */\t/' | expand -t 14

$(READY): settings.ini setup.py pyproject.toml constraints.txt
	@echo "== setting up $(VENV) (once; about two minutes and 6 GB)"
	$(PYTHON) -c 'import sys; sys.exit(None if sys.version_info >= (3, 10) else "Python >= 3.10 is needed, this is " + sys.version.split()[0] + ". Say: make PYTHON=python3.11 ...")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile -c constraints.txt -e '.[dev]'
	$(BIN)/python -m ipykernel install --sys-prefix --name python3 --display-name python3 >/dev/null
	@touch $@

setup: $(READY) ## the virtual environment

EVALUATION = 06_figures 07_attacks 08_ablations 09_robustness 10_similarity 11_released_code
METASTEP   = 12_metastep 13_metastep_results 17_regimes 18_kept 16_claims
reproduce: CHAPTERS = 05_tables
reproduce:       ## Tables 1-3 on the embedded portraits in 15 to 40 minutes, into figures/mini/, beside the published ones (PRESET=smoke|mini|paper, ARGS='-p data_dir /data')
evaluate: CHAPTERS = $(EVALUATION)
evaluate:        ## the rest of the evaluation, on the runs of `make reproduce`: figures, attacks, ablations, robustness, similarity
metastep: CHAPTERS = $(METASTEP)
metastep:        ## our own method against the others, on the same runs; other worlds; and the ledger of claims
published: CHAPTERS = 05_tables $(EVALUATION) $(METASTEP) 19_promises
published: ARGS += -p full true -p out_dir figures/published/$(PRESET)
published:       ## what is committed in figures/published/: all trainings and requests of the preset; a day or two, resumes after a stop
PAPERMILL = $(BIN)/papermill --no-progress-bar -k python3
reproduce evaluate metastep published: $(READY)
	@mkdir -p build
	@for n in $(CHAPTERS); do echo "== $$n (preset $(PRESET)); finished runs are read from runs/"; \
	  ONESHUI_PROGRESS=text $(PAPERMILL) --log-output nbs/$$n.ipynb build/$$n.ipynb -p preset $(PRESET) $(ARGS) || exit 1; done
	@echo "== done: see figures/$(PRESET)/ and the executed notebooks in build/"

tune: $(READY)   ## search every method's settings on the tuning requests of PRESET, into figures/published/$(PRESET)/tuning.csv; an hour
	ONESHUI_PROGRESS=text $(PAPERMILL) nbs/api/tuning.ipynb build/tuning.ipynb -p preset $(PRESET) -p methods None -p datasets None -p out_dir figures/published/$(PRESET)

test: $(READY)   ## export, README and notebooks in sync; unit tests; every notebook at preset smoke
	ONESHUI_PROGRESS=off $(BIN)/python -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder tests

export: $(READY) ## notebooks -> oneshui/
	$(BIN)/nbdev_export

readme: $(READY) ## nbs/index.ipynb -> README.md
	$(BIN)/jupyter nbconvert --log-level ERROR --to markdown --TagRemovePreprocessor.enabled=True --TagRemovePreprocessor.remove_input_tags=remove-input --output-dir . --output README.md nbs/index.ipynb

API_FIRST = core ranks metrics readers portraits attacks oracles presets cluster runs intervals results tables experiments tuning audits probes questions
DESK      = api/handlers api/photos api/kit api/rehearsal 14_prepare api/ledger api/reports 15_forget api/evidence api/aftermath api/inspection api/findings api/cli 19_promises
BOOK      = $(API_FIRST:%=api/%) 00_data_splits 01_vit_finetuning 02_baselines 03_metaunlearn 04_a100_training 05_tables $(EVALUATION) $(METASTEP) $(DESK) api/explore index
notebooks: $(READY) ## execute all notebooks in place at their defaults, then clean them
	@for n in $(BOOK); do \
	  echo "== $$n"; ONESHUI_PROGRESS=off $(PAPERMILL) --log-level ERROR nbs/$$n.ipynb nbs/$$n.ipynb || exit 1; done
	$(BIN)/nbdev_clean && $(BIN)/python docs/clean.py && $(MAKE) readme

docs: $(READY)   ## the site, from the notebooks as they are: build/docs/html/index.html
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[docs]'
	$(BIN)/python docs/build.py

test-browser: docs ## the site in headless Chromium (Debian's chromium, or any that is on the PATH)
	command -v chromium chromium-browser google-chrome >/dev/null || apt-get install -y -q chromium
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[browser]'
	$(BIN)/python -m pytest -q tests/browser

lab: $(READY)    ## JupyterLab on the index
	$(BIN)/jupyter lab nbs/index.ipynb

benchmark: $(READY) ## time and memory, ours against the naive forms, into figures/published/benchmark.json; some minutes; a request against a training step
	$(BIN)/python benchmarks/benchmark.py
	$(BIN)/python benchmarks/desk.py

gpu-check: $(READY) ## five minutes on a GPU: step time, utilisation, memory, bf16, hypergradient; adds a row to figures/published/gpu_check.csv
	$(BIN)/python benchmarks/gpu_check.py $(ARGS)

clean:           ## forget drawings and runs (the environment stays)
	rm -rf data data-large runs build
