# Two commands do everything: `make demo` and `make test`. The others are for those who work on the code.

VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin
STAMP := $(VENV)/installed-$(shell cat pyproject.toml constraints.txt | cksum | cut -d' ' -f1)
STUDY := benchmarks/study.yaml --records benchmarks/results/study/records.jsonl
MKDOCS := NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build

.PHONY: demo demo-t2i demo-pictures study study-page test test-slow test-gpu check docs format compare compare-t2i bench bench-gpu gpu clean

# Train a small DSMoE on real handwritten digits, then sample, score and plot it.
demo: $(STAMP)
	$(BIN)/diffusion-moe train digits --output_dir runs/digits
	$(BIN)/diffusion-moe sample runs/digits
	$(BIN)/diffusion-moe analyze runs/digits
	$(BIN)/diffusion-moe evaluate runs/digits

# From nothing, offline: train a text encoder and a small DiffMoE on drawn scenes of coloured shapes; draw and score
# prompts (about 14 minutes on two cores).
demo-t2i: $(STAMP)
	$(BIN)/diffusion-moe text-encoder runs/shapes-text
	$(BIN)/diffusion-moe train shapes-t2i --output_dir runs/shapes-t2i
	$(BIN)/diffusion-moe sample runs/shapes-t2i --prompts examples/shapes-prompts.txt --per_class 6
	$(BIN)/diffusion-moe evaluate runs/shapes-t2i

# Download 4,000 drawings (public domain; needs apt, or a folder: `make demo-pictures PICTURES_FROM=FOLDER`), train the
# recipe `pictures` on them, sample a grid by class, and draw samples beside the nearest training images.
demo-pictures: $(STAMP) pictures/metadata.jsonl
	$(BIN)/diffusion-moe train pictures --output_dir runs/pictures
	$(BIN)/diffusion-moe sample runs/pictures --per_class 8 --output runs/pictures/grid.png
	$(BIN)/python benchmarks/nearest.py runs/pictures runs/pictures/nearest.png
	$(BIN)/diffusion-moe evaluate runs/pictures

pictures/metadata.jsonl: | $(STAMP)
	PYTHON=$(BIN)/python examples/pictures.sh pictures $(PICTURES_FROM)

# A process a core, each on one thread; a file's tests stay together, for they share what they train.
test: $(STAMP)
	$(BIN)/pytest -n auto --dist loadfile --no-loadscope-reorder

# Proofs that take minutes.
test-slow: $(STAMP)
	$(BIN)/pytest -m slow

test-gpu: $(STAMP)
	$(BIN)/pytest -m gpu

check: $(STAMP)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache
	$(MKDOCS) --strict

# The documentation site, into site/index.html.
docs: $(STAMP)
	$(MKDOCS)

format: $(STAMP)
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

# Five routing rules on digits, three seeds each, into docs/digits.md (about an hour on two cores).
compare: $(STAMP)
	$(BIN)/python benchmarks/compare_digits.py

# DiffMoE and dense of equal activated parameters on coloured shapes, into docs/shapes.md (20 minutes on two cores).
compare-t2i: $(STAMP)
	$(BIN)/python benchmarks/compare_shapes.py

# The papers' claims on the same pictures, into docs/study.md; stop it at any time, the same command goes on (days on two
# cores; `.venv/bin/diffusion-moe study benchmarks/study.yaml --plan` estimates it).
study: $(STAMP) pictures/metadata.jsonl
	$(BIN)/diffusion-moe study $(STUDY)
	$(BIN)/diffusion-moe study $(STUDY) --page docs/study.md

study-page: $(STAMP)
	$(BIN)/diffusion-moe study $(STUDY) --page docs/study.md

# Speed and memory against a naive loop, into benchmarks/results and docs/performance.md (minutes on two cores).
bench: $(STAMP)
	$(BIN)/python benchmarks/run.py cpu

# The tables of a GPU, into benchmarks/results and docs/performance.md (under ten minutes on an H200).
bench-gpu: $(STAMP)
	$(BIN)/python benchmarks/run.py gpu

# The first run on a GPU, under ten minutes on an H200: its tests, waits, times, compiler and graphs, most valuable
# first, into benchmarks/results/gpu-stages.jsonl. Without an environment: python3 benchmarks/gpu.py.
gpu: $(STAMP)
	$(BIN)/python benchmarks/gpu.py

clean:
	rm -rf $(VENV) runs site

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "diffusion-moe needs Python 3.11 or newer; set PYTHON=")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[dev]"
	# Without its torchvision, which Inception does not need and which has no build for torch's CPU-only packages.
	$(BIN)/python -m pip install --quiet --no-deps -c constraints.txt torch-fidelity
	rm -f $(VENV)/installed-*
	touch $@
