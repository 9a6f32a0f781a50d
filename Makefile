# Everything runs in .venv, which is made here. The two commands a newcomer needs: `make demo`, `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
JOBS ?= 2

.PHONY: demo test lint gpu-test deep-test clean

$(VENV)/installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip setuptools
	@echo "installing pvae and its dependencies (torch is the large one) ..."
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $@

demo: $(VENV)/installed  ## encode and decode a photograph and a clip, eager and compiled; panel and table in demo-out/
	$(BIN)/pvae demo --out demo-out

test: $(VENV)/installed  ## the tests that need no GPU
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS)

lint: $(VENV)/installed  ## ruff and mypy, both must be clean
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	# mypy sees the package as it is installed: one folder, linked together from the root folders.
	rm -rf build/typed && mkdir -p build/typed/pvae
	ln -s $(CURDIR)/pvae/*.py $(CURDIR)/passes $(CURDIR)/runtime $(CURDIR)/kernels $(CURDIR)/tools build/typed/pvae/
	cd build/typed && $(CURDIR)/$(BIN)/mypy --config-file $(CURDIR)/pyproject.toml pvae

gpu-test: $(VENV)/installed  ## needs a CUDA or ROCm GPU
	$(BIN)/python -m pytest -m gpu

deep-test: $(VENV)/installed  ## the property tests with thousands of examples
	$(BIN)/python -m pytest --hypothesis-profile=deep

clean:
	rm -rf $(VENV) build demo-out
