# `make demo` and `make test` need nothing but python (>= 3.11) and make: they create .venv and install into it.
PYTHON ?= python3
VENV ?= .venv
INSTALLED := $(VENV)/.installed
RUN := $(VENV)/bin/python

.PHONY: help install demo app test test-newest test-lowest constraints check bench gpu base clean

help:
	@echo "make demo    learn a subject with CERSA, LoRA and full fine-tuning; picture and table in outputs/demo"
	@echo "make app     the page to compare, train and inspect in a browser (http://127.0.0.1:7860)"
	@echo "make test    the test suite, in the browser too where chromium is installed"
	@echo "make test-newest, make test-lowest    the same with the newest and the lowest versions that pyproject.toml admits"
	@echo "make constraints    constraints.txt anew, from the registry"
	@echo "make check   lint and formatting"
	@echo "make bench   speed and memory as ratios to LoRA and full fine-tuning: layers, loading, saving, decomposing a whole UNet"
	@echo "make gpu     on a machine with a GPU: layers, blocks and the suite there; docs/benchmarks-gpu.md"
	@echo "make base    rebuild the embedded models from openly licensed artwork (needs npm; long)"

install: $(INSTALLED)

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --upgrade pip
	$(RUN) -m pip install --constraint constraints.txt --editable ".[app,browser,plot,score,test]"
	touch $(INSTALLED)

demo: $(INSTALLED)
	$(RUN) scripts/demo.py

app: $(INSTALLED)
	$(RUN) gradio_app/app.py

# Two processes with a thread each: faster than one process with two.
test: $(INSTALLED)
	OMP_NUM_THREADS=1 $(RUN) -m pytest -n 2 --dist worksteal

# Environments of their own: .venv-newest without constraints, .venv-lowest with the lower bounds of pyproject.toml.
EXTRAS_TESTED := app,browser,plot,ray,score,test,train

test-newest:
	$(PYTHON) -m venv .venv-newest
	.venv-newest/bin/python -m pip install --quiet --upgrade pip
	.venv-newest/bin/python -m pip install --upgrade --upgrade-strategy eager --editable ".[$(EXTRAS_TESTED)]"
	OMP_NUM_THREADS=1 .venv-newest/bin/python -m pytest -n 2 --dist worksteal

test-lowest:
	$(PYTHON) -m venv .venv-lowest
	.venv-lowest/bin/python -m pip install --quiet --upgrade pip packaging
	.venv-lowest/bin/python scripts/lowest_versions.py > .venv-lowest/constraints.txt
	.venv-lowest/bin/python -m pip install --constraint .venv-lowest/constraints.txt --editable ".[$(EXTRAS_TESTED)]"
	OMP_NUM_THREADS=1 .venv-lowest/bin/python -m pytest -n 2 --dist worksteal

# transformers 5.24 wants a peft 0.22, which there is not yet. PYTHONS: the interpreters to resolve for.
PYTHONS ?= $(PYTHON)
constraints:
	$(PYTHON) -m venv .venv-constraints
	.venv-constraints/bin/python -m pip install --quiet packaging
	.venv-constraints/bin/python scripts/make_constraints.py --pythons $(PYTHONS) --with "transformers<5.24" > constraints.txt.new
	mv constraints.txt.new constraints.txt

check: $(INSTALLED)
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .

bench: $(INSTALLED)
	$(RUN) benchmarks/layers.py
	$(RUN) benchmarks/loading.py
	$(RUN) benchmarks/saving.py
	$(RUN) benchmarks/whole_model.py --fraction 0.1

# On a machine with a GPU, in nine minutes. Without one: make gpu DEVICE=cpu SMALL=1
DEVICE ?= cuda
gpu: $(INSTALLED)
	$(RUN) benchmarks/gpu.py --device $(DEVICE) $(if $(SMALL),--small)

base: $(INSTALLED)
	$(RUN) -m pip install --quiet --constraint constraints.txt --editable ".[base]"
	GOMP_SPINCOUNT=2000 $(RUN) scripts/build_base.py

clean:
	rm -rf outputs build
