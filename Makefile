# Needs Python 3.10, 3.11 or 3.12. To use another one than `python3`: make PYTHON=python3.11 demo
PYTHON ?= python3
PYTEST_FLAGS ?=
# pip compiles no bytecode below, so the first process that imports a library does; if it could not write it, every process would take 20 s.
unexport PYTHONDONTWRITEBYTECODE
# Two tests run at a time, with one thread each: with two each, threads wait for each other more than they compute.
PYTEST = MKL_NUM_THREADS=1 $(1)/bin/python -m pytest $(2) $(PYTEST_FLAGS)
JOB ?= decoder-lora
BENCH_FLAGS ?= --details
TRUESIZE_FLAGS ?=
UV_COMPILE = ../.venv-lock/bin/uv pip compile --quiet --universal --no-header --no-annotate --python-version

# $(call make_venv,FOLDER,LOCK[,BASE]): the locks are complete, so pip resolves nothing. Packages that the environment BASE
# has in the same version are used from there.
packages_of = $$($(1)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
define make_venv
@$(PYTHON) -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 12))' || \
	{ echo "Python 3.10, 3.11 or 3.12 is needed: make PYTHON=python3.11 ..."; exit 1; }
@echo "Installing $(2) into $(1) (2 GB or more; takes some minutes, the first time only)"
@$(PYTHON) -m venv $(1)
$(if $(3),@echo "$(call packages_of,$(3))" > "$(call packages_of,$(1))/base.pth")
@$(1)/bin/python -m pip install -q --no-compile --no-deps -r $(2)
@$(1)/bin/python -m pip install -q --no-deps --no-build-isolation -e .
@touch $@
endef

.PHONY: help demo toys gate test test-engine precision lint test-paddle26 parity parity-new bench truesize torture \
	flags docs dist venvs lock clean

help:
	@echo "make demo           fine-tune a tiny Kandinsky 2.2 to a new look on the CPU and generate images (JOB=lcm-lora: another job)"
	@echo "make gate           train every job, measure its images and write docs/results.md (one to two hours)"
	@echo "make toys           train again the tiny models that the package ships (five hours)"
	@echo "make test           run the tests (PYTEST_FLAGS='tests/data -x' for some of them)"
	@echo "make test-engine    run the tests of Paddle's inference engine"
	@echo "make precision      run every training script in fp16 and bf16, O1 and O2, on a device in software (half an hour)"
	@echo "make lint           check code and formatting with ruff"
	@echo "make test-paddle26  run on Paddle 2.6 the tests whose outcome may depend on Paddle's version"
	@echo "make parity         compare with the PyTorch reference"
	@echo "make parity-new     compare with newer releases of it, which have models that came later (Python 3.11 or 3.12)"
	@echo "make bench          compare speed with PyTorch and write docs/performance.md (hours; BENCH_FLAGS='--jobs prior': one job)"
	@echo "make truesize       run jobs at the published models' size and write docs/true_size.md (hours, 24 GB of memory)"
	@echo "make torture        kill runs 240 times and resume them, disturb 2 to 4 ranks, resume every job on other numbers of ranks"
	@echo "make flags          write the reference of flags, docs/en/flags.md and docs/zh/flags.md"
	@echo "make docs           build the site of the docs, in both languages, into outputs/website/html"
	@echo "make dist           build the archive of the sources and the wheel in dist/"
	@echo "make venvs          create the four environments, without running anything"
	@echo "make lock           write the requirements*.txt again from the .in files"
	@echo "make clean          remove the environments and caches"

demo: .venv/ready
	.venv/bin/ppdiffusers-train demo --job $(JOB)

# `make -j2 toys` trains two at a time. Each uses one thread and Paddle's unpatched functions, because the bits of a sum depend
# on the number of threads and on the order.
TOYS = outputs/toys
WEIGHTS = ppdiffusers_train/toy/weights
RECIPE = MKL_NUM_THREADS=1 PPDIFFUSERS_TRAIN_CPU_LEVERS=none .venv/bin/python -m ppdiffusers_train.toy.recipes.train
ENCODERS = $(TOYS)/vae_further/vae.safetensors $(TOYS)/movq_further/movq_shapes.safetensors \
	$(TOYS)/vision_further/clip.safetensors
PIPELINES = $(addprefix $(TOYS)/,$(addsuffix .safetensors,decoder prior sd last/sdxl last/sd3))

toys: $(PIPELINES)
	cp $(PIPELINES) $(WEIGHTS)

$(TOYS)/vae/vae.safetensors: .venv/ready
	$(RECIPE)_vae --output_dir $(@D)

$(TOYS)/vae_further/vae.safetensors: $(TOYS)/vae/vae.safetensors
	$(RECIPE)_vae --output_dir $(@D) --start_from $< --seed 1 \
		--train_batch_size 32 --max_train_steps 2500 --learning_rate 2e-3

$(TOYS)/movq/movq_shapes.safetensors: .venv/ready
	$(RECIPE)_movq_shapes --output_dir $(@D)

$(TOYS)/movq_further/movq_shapes.safetensors: $(TOYS)/movq/movq_shapes.safetensors
	$(RECIPE)_movq_shapes --output_dir $(@D) --start_from $< --seed 1 --max_train_steps 1500 --learning_rate 1e-3

$(TOYS)/clip/clip.safetensors: .venv/ready
	$(RECIPE)_clip --output_dir $(@D)

$(TOYS)/clip_further/clip.safetensors: $(TOYS)/clip/clip.safetensors
	$(RECIPE)_clip --output_dir $(@D) --start_from $< --seed 1 --max_train_steps 2000 --learning_rate 1e-3

$(TOYS)/vision/clip.safetensors: $(TOYS)/clip_further/clip.safetensors
	$(RECIPE)_vision --output_dir $(@D) --start_from $<

$(TOYS)/vision_further/clip.safetensors: $(TOYS)/vision/clip.safetensors
	$(RECIPE)_vision --output_dir $(@D) --start_from $< --seed 1 \
		--nameless_colours --train_batch_size 64 --max_train_steps 5000

# The models that generate images are trained with the encoders of the package.
$(TOYS)/encoders: $(ENCODERS)
	cp $^ $(WEIGHTS)
	touch $@

$(TOYS)/%.safetensors: $(TOYS)/encoders
	$(RECIPE)_pipelines $* --output_dir $(TOYS)

$(TOYS)/further/decoder_of_all_looks.safetensors: $(TOYS)/decoder_of_all_looks.safetensors
	$(RECIPE)_pipelines decoder_of_all_looks --output_dir $(@D) --start_from $< --seed 1 \
		--max_train_steps 16000 --learning_rate 1.5e-3

$(TOYS)/decoder.safetensors: $(TOYS)/further/decoder_of_all_looks.safetensors
	$(RECIPE)_pipelines decoder --output_dir $(TOYS) --start_from $< --seed 2

$(TOYS)/further/sdxl.safetensors: $(TOYS)/sdxl.safetensors
	$(RECIPE)_pipelines sdxl --output_dir $(@D) --start_from $< --seed 1 --max_train_steps 6000 --learning_rate 1e-3

$(TOYS)/last/sdxl.safetensors: $(TOYS)/further/sdxl.safetensors
	$(RECIPE)_pipelines sdxl --output_dir $(@D) --start_from $< --seed 2 --max_train_steps 9000 --learning_rate 1e-3

$(TOYS)/further/sd3.safetensors: $(TOYS)/sd3.safetensors
	$(RECIPE)_pipelines sd3 --output_dir $(@D) --start_from $< --seed 1 --max_train_steps 6000 --learning_rate 1e-3

$(TOYS)/last/sd3.safetensors: $(TOYS)/further/sd3.safetensors
	$(RECIPE)_pipelines sd3 --output_dir $(@D) --start_from $< --seed 2 --max_train_steps 9000 --learning_rate 1e-3

gate: .venv/ready
	$(call PYTEST,.venv,tests/gate -m slow --dist loadgroup)
	.venv/bin/python -m tests.gate.report outputs/gate docs

test: .venv/ready
	$(call PYTEST,.venv)

test-engine: .venv/ready
	$(call PYTEST,.venv,tests/cpu -m engine -n 0)

# The device in software needs g++ on Linux x86-64; elsewhere these tests are skipped.
precision: .venv/ready
	$(call PYTEST,.venv,tests/device -m "precision or not precision")

lint: .venv/ready
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .

test-paddle26: .venv-paddle26/ready
	$(call PYTEST,.venv-paddle26,-m "not slow and not once and not torture and not precision")

parity: .venv-parity/ready
	$(call PYTEST,.venv-parity,tests/parity)

parity-new: .venv/ready .venv-parity-new/ready
	$(call PYTEST,.venv,tests/parity_new -n 0)

bench: .venv-parity/ready
	.venv-parity/bin/python benchmarks/speed.py $(BENCH_FLAGS)

truesize: .venv-parity/ready
	.venv/bin/python benchmarks/true_size.py $(TRUESIZE_FLAGS)

torture: .venv/ready
	.venv/bin/python -m pytest tests/distributed -m slow -n 0
	MKL_NUM_THREADS=1 .venv/bin/python -m tests.distributed.torture --cases signal=60 kill=40 flag=100 copy=30 slow=20 twice=10
	.venv/bin/python -m tests.distributed.kill_harness --kills 120 --double_kills 30
	.venv/bin/python -m tests.distributed.kill_harness --kills 40 --double_kills 10 --job lora_sd
	.venv/bin/python -m tests.distributed.kill_harness --kills 40 --double_kills 10 --job lora_sd3
	.venv/bin/python -m tests.distributed.kill_harness --kills 40 --double_kills 10 --job lcm_sd

flags: .venv/ready
	.venv/bin/python -m website.flags

docs: .venv-docs/ready
	.venv-docs/bin/python -m website.build

# The wheel is built from the archive, so nothing that lies about in a checkout is in it.
dist: .venv/ready
	rm -rf dist
	.venv/bin/python -c 'from setuptools import build_meta; build_meta.build_sdist("dist")'
	.venv/bin/python -m pip wheel -q --no-build-isolation --no-deps -w dist dist/*.tar.gz

venvs: .venv/ready .venv-paddle26/ready .venv-parity/ready .venv-parity-new/ready

.venv/ready: requirements/dev.txt setup.py
	$(call make_venv,.venv,requirements/dev.txt)

.venv-paddle26/ready: requirements/paddle26.txt setup.py
	$(call make_venv,.venv-paddle26,requirements/paddle26.txt)

.venv-parity/ready: requirements/parity.txt setup.py .venv/ready
	$(call make_venv,.venv-parity,requirements/parity.txt,.venv)

.venv-parity-new/ready: requirements/parity-new.txt setup.py .venv/ready
	$(call make_venv,.venv-parity-new,requirements/parity-new.txt,.venv)

# Needs nothing of the package.
.venv-docs/ready: requirements/docs.txt
	@$(PYTHON) -m venv .venv-docs
	@.venv-docs/bin/python -m pip install -q --no-deps -r requirements/docs.txt
	@touch $@

# Keeps the versions that are already locked where the .in files allow it.
lock:
	$(PYTHON) -m venv .venv-lock
	.venv-lock/bin/python -m pip install -q uv
	cd requirements && $(UV_COMPILE) 3.10 ../requirements.in -o ../requirements.txt
	cd requirements && $(UV_COMPILE) 3.10 dev.in -o dev.txt
	cd requirements && $(UV_COMPILE) 3.10 paddle26.in -o paddle26.txt
	cd requirements && $(UV_COMPILE) 3.10 docs.in -o docs.txt
	grep -Ev '^(tokenizers|huggingface-hub)=' requirements.txt > requirements/shared.full
	cd requirements && $(UV_COMPILE) 3.10 parity.in -c shared.full --override parity.override -o parity.full
	grep -Ev '^(nvidia|cuda|triton|torchvision|timm)' requirements/parity.full > requirements/parity.txt
	cd requirements && $(UV_COMPILE) 3.11 parity-new.in -c shared.full -o parity-new.full
	grep -Ev '^(nvidia|cuda|triton)' requirements/parity-new.full > requirements/parity-new.txt
	rm requirements/*.full

clean:
	rm -rf .venv .venv-paddle26 .venv-parity .venv-parity-new .venv-docs .venv-lock build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
