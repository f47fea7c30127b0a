# Everything that a person or a CI runs. Each target does all set-up by itself, and says so; the second time
# that takes no time. Options for pytest: make test-lab ARGS="-k hostdev"

PYTHON := .venv/bin/python
PYTEST := $(PYTHON) -m pytest
SUDO := $(if $(filter 0,$(shell id -u)),,sudo)
RINGS := test-unit test-kernel test-lab
VM := $(PYTHON) -m tests.lab.vm
# In the lab VM, an emulated CPU on a busy machine: a hang is ended, slowness isn't.
LAB_DEADLINE_S := 7200
DEMO_DEADLINE_S := 2400
# What is measured has the machine alone, and a guest's work goes on beside the kernel's for it.
BENCH_VM := $(VM) --cpus 2 --deadline $(DEMO_DEADLINE_S)
ARGS :=
# So wide that a failed test's reason stands beside its name at the end.
export COLUMNS := 250

.PHONY: help setup test $(RINGS) test-lab-datapath test-lab-libvirt test-lab-long test-lab-older test-lab-selinux
.PHONY: lab-shell demo bench bench-datapath bench-start bench-vhost lint clean

help:
	@echo 'make demo        the main job, shown in a VM with an SR-IOV NIC'
	@echo 'make test        all tests; test-unit, test-kernel, test-lab: one ring'
	@echo 'make lab-shell   a shell in that VM'
	@echo 'make bench       speed and memory'
	@echo 'make test-lab-long   what takes an hour more: a daemon killed anywhere, the full form, migration, save, SELinux'
	@echo 'make test-lab-older  all that libvirt has a part in, with the libvirt of Debian 12 itself; an hour and a half'
	@echo 'make bench-start     virsh start with the hook beside without'
	@echo 'make bench-vhost     socket+vhost beside tap+vhost on one device'
	@echo 'make bench-datapath  throughput and latency of every combination, into docs/'
	@echo 'make lint        ruff, mypy, import-linter'
	@echo 'make setup       only the set-up that each of them does first'

setup:
	@tests/setup

# All rings run, whichever fails; none may skip.
test: setup
	+@VNET_LOCK_REQUIRE=unit,kernel,lab $(MAKE) --keep-going --no-print-directory $(RINGS)

test-unit: setup
	$(PYTEST) tests/unit $(ARGS)

# Root makes the namespaces; nothing that it writes stays in a checkout that isn't root's, so the image of the
# guests is built before.
test-kernel: setup
	@$(PYTHON) -c 'from tests.lab import image, older; image.build(); older.is_offered() and older.unpack()'
	$(SUDO) env VNET_LOCK_REQUIRE="$$VNET_LOCK_REQUIRE" COLUMNS="$$COLUMNS" PYTHONDONTWRITEBYTECODE=1 \
		$(PYTEST) -p no:cacheprovider tests/kernel $(ARGS)

# Two VMs at once, each with a part of the ring, as a guest's boot is most of a test; what takes longer than a CI
# has is marked long. With ARGS one VM has all of it. Emulated CPUs below emulated CPUs now and then stop a guest for
# longer than it bears: a test that fails is run once more, and the end says which. And now and then the VM itself
# is gone, without a word: another one has what is left.
IN_LAB = $(VM) $(HOST) --resumable --deadline $(LAB_DEADLINE_S) --env VNET_LOCK_REQUIRE="$$VNET_LOCK_REQUIRE" \
	--env COLUMNS="$$COLUMNS" -- sh -c \
	'exec python -m pytest -p no:cacheprovider -p tests.lab.resume -v -rR --reruns 1 --durations=15 --junitxml="$$VNET_LAB_RESULTS/junit.xml" "$$@"' pytest
lab_tests = $(patsubst %,tests/lab/test_%.py,$(1))
LAB_LIBVIRT := $(call lab_tests,contenders hotplug late_vf life main_job rerun vlan whole_pf)
LAB_DATAPATH := $(filter-out $(LAB_LIBVIRT),$(wildcard tests/lab/test_*.py))

test-lab: setup
ifeq ($(ARGS),)
	+@$(MAKE) --keep-going --no-print-directory -j2 test-lab-datapath test-lab-libvirt
else
	$(IN_LAB) tests/lab $(ARGS)
endif

test-lab-datapath: setup
	$(IN_LAB) -m 'not long' $(LAB_DATAPATH) $(ARGS)

test-lab-libvirt: setup
	$(IN_LAB) -m 'not long' $(LAB_LIBVIRT) $(ARGS)

LAB_SELINUX := $(call lab_tests,selinux)

test-lab-long: setup test-lab-selinux
	$(IN_LAB) -m long $(filter-out $(LAB_SELINUX),$(wildcard tests/lab/test_*.py)) $(ARGS)

# In the place of AppArmor.
test-lab-selinux: HOST := --kernel security=selinux --kernel enforcing=0
test-lab-selinux: setup
	$(IN_LAB) $(LAB_SELINUX)

# With the libvirt that Debian 12 itself has, 9.0, in the place of its backports' one.
test-lab-older: HOST := --older
test-lab-older: setup
	$(IN_LAB) $(LAB_LIBVIRT) $(call lab_tests,daemon full_form installation migration saved) $(ARGS)

lab-shell: setup
	@$(VM) --shell

demo: setup
	@$(VM) --deadline $(DEMO_DEADLINE_S) -- python -u -m tests.lab.demo $(ARGS)

bench: setup
	@$(PYTHON) -m tests.bench.run $(ARGS)

# A guest's start with the hook beside one without it; 1 where the hook takes more than it may.
bench-start: setup
	$(VM) --counted --deadline $(DEMO_DEADLINE_S) -- python -u -m tests.lab.bench_start

# 1 where socket+vhost takes more than it may.
bench-vhost: setup
	$(BENCH_VM) -- python -u -m tests.lab.bench_vhost_user

# Beside each other: what this machine can do in namespaces, and what takes the lab VM; docs/datapath.md shows it.
bench-datapath: setup
	@mkdir -p .lab
	$(SUDO) $(PYTHON) -m tests.bench.datapath --json .lab/datapath-namespaces.json
	$(BENCH_VM) -- sh -c \
		'exec python -m tests.bench.datapath --lab --json "$$VNET_LAB_RESULTS/datapath.json"'
	$(PYTHON) -m tests.bench.datapath --report .lab/datapath-namespaces.json .lab/last/datapath.json

lint: setup
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy --strict vnet_lock
	.venv/bin/lint-imports

clean:
	rm -rf .lab build .mypy_cache .ruff_cache .pytest_cache .import_linter_cache
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
