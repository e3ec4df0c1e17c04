# make demo | make ladder | make story | make test-quick | make test | make check | make docs | make bench | make gpu-registers | make gpu-plans | make release-check
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
SOURCES := pyproject.toml setup.py constraints.txt $(wildcard csrc/*.h csrc/*/*)
# by all cores, where pip takes one; some packages ship files of another Python's syntax
BYTECODE = $(BIN)/python -m compileall -qq -j 0 $(VENV)/lib || true

.PHONY: demo ladder story test test-quick check docs docs-pictures bench bench-peers gpu-registers gpu-plans architectures release-check clean

# `align` and what it needs
$(VENV)/.installed: $(SOURCES)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --no-compile --constraint constraints.txt --editable .
	$(BYTECODE)
	touch $@

# and the peers, test and bench tools; the CUDA kernels too, where nvcc is but no GPU
$(VENV)/.installed-dev: $(SOURCES)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	FORCE_CUDA=1 $(BIN)/pip install --quiet --no-compile --constraint constraints.txt --editable '.[dev]'
	$(BYTECODE)
	touch $(VENV)/.installed $@

demo: $(VENV)/.installed
	$(BIN)/align demo

# the same for three seeds: mean and spread of every method
ladder: $(VENV)/.installed
	$(BIN)/align demo --seeds 0 1 2

# from answers of two models to a policy: examples/story/README.md
story: $(VENV)/.installed-dev
	$(BIN)/python examples/story/run.py

# two at a time, on one thread each, and asleep while it waits: a spinning one costs tenfold when its core is taken
PYTEST := OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive $(BIN)/python -m pytest
test: $(VENV)/.installed-dev
	$(PYTEST) tests -n 2 --dist loadfile

# some of every area, named in tests/quick.py; Triton's interpreter wants a process of its own
test-quick: $(VENV)/.installed-dev
	$(PYTEST) tests -m quick -n 2 --dist loadfile
	TRITON_INTERPRET=1 $(PYTEST) tests/triton_interp -m quick

check: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/python tests/mutants.py --check

# site/index.html (with the search: python3 -m http.server -d site); a warning fails it, as does a link that leads nowhere
docs: $(VENV)/.installed-dev
	$(BIN)/python docs/tables.py
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

# docs/pictures/*.svg
docs-pictures: $(VENV)/.installed-dev
	$(BIN)/python docs/pictures.py

# align_kernels beside its peers, a quarter of an hour on two cores: benches/results/bench.json, its page and pictures
bench: $(VENV)/.installed-dev build/peers
	PYTHONPATH=build/peers $(BIN)/python -m pytest benches/bench_questions.py -q -rs --benchmark-json benches/results/bench.json
	$(BIN)/python docs/tables.py
	$(BIN)/python docs/pictures.py

# peers of which a file is used, without what the rest of them asks for
build/peers: constraints.txt
	$(BIN)/pip install --quiet --no-deps --upgrade --constraint constraints.txt --target $@ verl quack-kernels \
		|| echo "verl and QuACK are not there: the benchmark will say so"
	mkdir -p $@ && touch $@

# the table of docs/LOG.md: align_kernels beside eager, TRL, Liger, torch.compile and Cut Cross-Entropy
bench-peers: $(VENV)/.installed-dev
	$(BIN)/python benches/peers.py

# docs/gpu_registers.md: every Triton kernel compiled for every GPU, which needs none; TRITON: a folder with another release
gpu-registers: $(VENV)/.installed-dev
	PYTHONPATH=$(addsuffix :,$(TRITON))kernels:tests $(BIN)/python tests/triton_compile.py

# docs/gpu_plans.md: what the planner chooses on a GPU, and how long a model says that it takes
gpu-plans: $(VENV)/.installed-dev
	PYTHONPATH=kernels $(BIN)/python benches/gpu/model.py

# the table of docs/architectures.md, each line checked as it is written
architectures: $(VENV)/.installed-dev
	$(BIN)/python tests/architectures.py docs/architectures.md

# wheels and source distributions of both packages, each tried in environments of its own
release-check:
	$(PYTHON) tests/release_check.py

clean:
	rm -rf $(VENV) build *.egg-info kernels/align_kernels/*.so
