# `make demo` and `make test` need nothing but python (>= 3.10) and make: they create .venv and install into it.
PYTHON ?= python3
VENV ?= .venv
INSTALLED := $(VENV)/.installed
RUN := $(VENV)/bin/python

.PHONY: help install demo app test check bench base clean

help:
	@echo "make demo    learn a subject with CERSA, LoRA and full fine-tuning; picture and table in outputs/demo"
	@echo "make app     the page to compare, train and inspect in a browser (http://127.0.0.1:7860)"
	@echo "make test    the test suite"
	@echo "make check   lint and formatting"
	@echo "make bench   speed and memory as ratios to LoRA and full fine-tuning: layers, loading, decomposing a whole UNet"
	@echo "make base    rebuild the embedded models from openly licensed artwork (needs npm; long)"

install: $(INSTALLED)

$(INSTALLED): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --upgrade pip
	$(RUN) -m pip install --editable ".[app,plot,score,test]"
	touch $(INSTALLED)

demo: $(INSTALLED)
	$(RUN) scripts/demo.py

app: $(INSTALLED)
	$(RUN) gradio_app/app.py

# Two processes with a thread each: faster than one process with two.
test: $(INSTALLED)
	OMP_NUM_THREADS=1 $(RUN) -m pytest -n 2 --dist worksteal

check: $(INSTALLED)
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .

bench: $(INSTALLED)
	$(RUN) benchmarks/layers.py
	$(RUN) benchmarks/loading.py
	$(RUN) benchmarks/whole_model.py --fraction .1

base: $(INSTALLED)
	$(RUN) -m pip install --quiet --editable ".[base]"
	GOMP_SPINCOUNT=2000 $(RUN) scripts/build_base.py

clean:
	rm -rf outputs build
