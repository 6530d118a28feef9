# make demo · make demo-full · make demo-resolution · make demo-pairs · make test · make test-all · make docs · make lint · make setup · make study · make study-table · make teacher · make backbone
# Each sets everything up first (tools/setup.sh), once; PYTHON=python3.12 picks the interpreter.
SHELL := /bin/bash
# STACK=onedl takes the maintained fork of requirements-onedl.txt, in an environment of its own.
STACK := upstream
VENV := $(if $(filter onedl,$(STACK)),.venv-onedl,.venv)
PY := $(VENV)/bin/python
# Another pin, another way to set up, or a checkout that has moved: set up again.
STAMP := $(VENV)/.mmkd-setup-$(shell (pwd; cat requirements.txt requirements-onedl.txt tools/setup.sh pyproject.toml) | sha256sum | cut -c -12)

# Digits in larger photographs, for the teacher that sees more pixels.
LARGE := --out data/digits_large --size 192 --train 2000 --val 250 --test 500 --digits 4 10 --heights 14 60

.PHONY: demo demo-full demo-resolution demo-pairs teacher large-teacher cascade-teacher unlabelled-teacher backbone study study-table study-backbones test test-all docs lint setup
.DEFAULT_GOAL := test

setup: $(STAMP)

$(STAMP):
	@MMKD_STACK=$(STACK) $(if $(PYTHON),MMKD_PYTHON=$(PYTHON)) bash tools/setup.sh $(STAMP)

demo: $(STAMP)
	$(PY) tools/make_digits.py
	$(PY) tools/compare.py configs/digits/demo.py --seeds 0 --work-dir work_dirs/demo
	@echo "One seed and a short schedule prove nothing. The committed runs on the whole schedule:"
	$(PY) tools/compare.py configs/digits/paper.py configs/digits/paper_start.py configs/digits/mmkd.py --plain configs/digits/plain.py --seeds 0 1 2 3 4 --table-only --results benchmarks/digits.jsonl --work-dir work_dirs/demo/committed

demo-full: $(STAMP)
	$(PY) tools/make_digits.py
	$(PY) tools/compare.py configs/digits/paper.py configs/digits/paper_start.py configs/digits/mmkd.py --plain configs/digits/plain.py --seeds 0 1 2 3 4 --work-dir work_dirs/demo-full

# A teacher on images of twice the size: three seeds; stopped, it goes on.
demo-resolution: $(STAMP)
	$(PY) tools/make_digits.py $(LARGE)
	$(PY) tools/compare.py configs/digits/large_to_half.py --plain configs/digits/half.py configs/digits/large.py --seeds 0 1 2 --work-dir work_dirs/demo-resolution

# Another backbone family, another kind of head, other classes; half the schedule, three seeds.
HALF := train_cfg.max_epochs=4 train_cfg.val_interval=4 param_scheduler.1.T_max=4 param_scheduler.1.end=4
demo-pairs: $(STAMP)
	$(PY) tools/make_digits.py
	$(PY) tools/compare.py configs/digits/pairs/to_mobilenet.py configs/digits/pairs/from_cascade.py configs/digits/pairs/four_classes.py --seeds 0 1 2 --cfg-options $(HALF) --work-dir work_dirs/demo-pairs

# Makes checkpoints/digits_large_teacher.pth again.
large-teacher: $(STAMP)
	$(PY) tools/make_digits.py $(LARGE)
	OMP_NUM_THREADS=1 $(PY) tools/train.py configs/digits/large.py --work-dir work_dirs/digits_large_teacher --resume
	rm -f work_dirs/digits_large_teacher/digits_large_teacher-*.pth
	$(PY) tools/publish_model.py work_dirs/digits_large_teacher/epoch_8.pth work_dirs/digits_large_teacher/digits_large_teacher.pth
	mv work_dirs/digits_large_teacher/digits_large_teacher-*.pth checkpoints/digits_large_teacher.pth

# Makes checkpoints/digits_teacher.pth again: half an hour on one core.
teacher: $(STAMP)
	$(PY) tools/make_digits.py
	OMP_NUM_THREADS=1 $(PY) tools/train.py configs/digits/teacher.py --work-dir work_dirs/digits_teacher --resume
	rm -f work_dirs/digits_teacher/digits_teacher-*.pth
	$(PY) tools/publish_model.py work_dirs/digits_teacher/epoch_16.pth work_dirs/digits_teacher/digits_teacher.pth
	mv work_dirs/digits_teacher/digits_teacher-*.pth checkpoints/digits_teacher.pth

# Makes the teacher and the backbone of configs/digits/unlabelled/, which have seen no image that has
# no labels there: half an hour and five minutes on one core.
FIRST := --out data/digits_first --half first --train 4000
SECOND := --out data/digits_second --half second --labelled 800
unlabelled-teacher: $(STAMP)
	$(PY) tools/make_digits.py $(FIRST)
	$(PY) tools/make_digits.py $(SECOND)
	OMP_NUM_THREADS=1 $(PY) tools/pretrain_digits.py --config configs/digits/unlabelled/plain.py --epochs 100 --out checkpoints/digits_800_backbone.pth
	OMP_NUM_THREADS=1 $(PY) tools/train.py configs/digits/unlabelled/teacher.py --work-dir work_dirs/digits_first_teacher --resume
	rm -f work_dirs/digits_first_teacher/digits_first_teacher-*.pth
	$(PY) tools/publish_model.py work_dirs/digits_first_teacher/epoch_32.pth work_dirs/digits_first_teacher/digits_first_teacher.pth
	mv work_dirs/digits_first_teacher/digits_first_teacher-*.pth checkpoints/digits_first_teacher.pth

# Makes checkpoints/digits_cascade_teacher.pth, for configs/digits/pairs/.
cascade-teacher: $(STAMP)
	$(PY) tools/make_digits.py
	OMP_NUM_THREADS=1 $(PY) tools/train.py configs/digits/pairs/cascade_teacher.py --work-dir work_dirs/digits_cascade_teacher --resume
	rm -f work_dirs/digits_cascade_teacher/digits_cascade_teacher-*.pth
	$(PY) tools/publish_model.py work_dirs/digits_cascade_teacher/epoch_16.pth work_dirs/digits_cascade_teacher/digits_cascade_teacher.pth
	mv work_dirs/digits_cascade_teacher/digits_cascade_teacher-*.pth checkpoints/digits_cascade_teacher.pth

# Makes checkpoints/digits_student_backbone.pth again: four minutes on one core.
backbone: $(STAMP)
	$(PY) tools/make_digits.py
	OMP_NUM_THREADS=1 $(PY) tools/pretrain_digits.py

# Three students of one teacher, in stages. Hours; stopped, it goes on. The tables need no data.
STUDY_DATA := --out data/digits_study --labelled 250
STUDIES := plain plain_train paper paper_train methods combinations
study_of = $(PY) tools/study.py benchmarks/study/$(1).py --results benchmarks/study/$(1).jsonl --work-dir work_dirs/study
study: $(STAMP)
	$(PY) tools/make_digits.py $(STUDY_DATA)
	$(foreach name,$(STUDIES),$(call study_of,$(name)) &&) true

# Of the studies that have results; of one that is not finished yet as far as they go.
study-table: $(STAMP)
	$(foreach name,$(STUDIES),$(if $(wildcard benchmarks/study/$(name).jsonl),{ $(call study_of,$(name)) --table-only || [ $$? = 1 ]; } &&)) true

# Makes the backbones of the middle and the near student again: 5 and 15 minutes, beside other work.
study-backbones: $(STAMP)
	$(PY) tools/make_digits.py $(STUDY_DATA)
	for name in middle near; do OMP_NUM_THREADS=1 $(PY) tools/pretrain_digits.py --config configs/digits/study/$$name.py --ann-file train.json --epochs 10 --out checkpoints/digits_$${name}_backbone.pth || exit 1; done

lint: $(STAMP)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

# Workers of the suite, each on a core of its own; it takes half as long with two.
WORKERS := 2
PYTEST := $(PY) -m pytest -q -n $(WORKERS) --dist worksteal --durations=15 --durations-min=1

test: lint
	$(PYTEST) -m "not slow"

# What the site and the tutorial's notebook need beside the rest; installed once.
DOCS := $(VENV)/.mmkd-docs-$(shell cat requirements-docs.txt 2>/dev/null | sha256sum | cut -c -12)
$(DOCS): $(STAMP)
	$(PY) -m pip --no-input --disable-pip-version-check install -q -r requirements-docs.txt
	@touch $@

# The site, in build/docs; a warning, such as a link to nowhere, is an error.
docs: $(DOCS)
	$(PY) -m sphinx -W --keep-going -q docs build/docs
	@echo "open build/docs/index.html"

# All of that, and what is marked slow: each kind of hostile file at each door (make test has two
# at each, and each at the one reader), a step under torch.compile, a look at 300 images,
# the wheel, published students outside of mmkd and in ONNX, combinations of methods, further loops and
# numbers of workers that are resumed, the site, and the commands of README and tutorial.
test-all: lint $(DOCS)
	$(PYTEST)
