# Development recipes. `./dev RECIPE` makes the environment first; with it active, `just RECIPE` does the same.

python := justfile_directory() / ".venv/bin/python"
export PYTHONDONTWRITEBYTECODE := "1"
# What every room of bench/ uses. Never the repository's root: its kernels/ would shadow the Hub's package.
shared := justfile_directory() / "bench/shared"
export PYTHONPATH := if env("PYTHONPATH", "") == "" { shared } else { shared + ":" + env("PYTHONPATH") }
# "$@" keeps an argument whole, such as a regular expression.
set positional-arguments := true

# List the recipes.
default:
    @just --list --unsorted

# Fine-tune SmolLM2-135M with LoRA for a few minutes and show that it learned.
demo *args:
    {{python}} bench/training/finetune.py --demo "$@"

# Fine-tune a language model with any variant; --help lists the options.
finetune *args:
    {{python}} bench/training/finetune.py "$@"

# Every method with three seeds, at rates that a sweep chose: the variant table's figures. Hours; started anew, it goes on.
study *args:
    {{python}} bench/training/study.py "$@"

# Rewrite the tables of README.md and docs/ from bench/results/.
readme-tables *args:
    {{python}} bench/report/tables.py "$@"

# Draw the pictures of docs/img/ from bench/results/.
plots:
    {{python}} bench/report/plots.py

# Check every variant on Qwen3-0.6B, or on random weights of that architecture where no hub is reached.
qwen-probe *args:
    {{python}} bench/training/qwen_probe.py "$@"

# Every method on SmolLM2-135M in 4 and 8 bit: start, gradients, training, detach, save and load.
bnb-smoke *args:
    {{python}} bench/training/bnb_smoke.py "$@"

# The tests: the library's, then the kernels' in Triton's interpreter; a process a core. -k may select from one alone.
test *args:
    #!/usr/bin/env bash
    set -x
    export OMP_NUM_THREADS=1
    {{python}} -m pytest -n auto -m "not slow" "$@" || library=$?
    [[ ${library:-5} = 5 ]] || exit $library
    TRITON_INTERPRET=1 {{python}} -m pytest -n auto -m "not slow" tests/kernels "$@" || kernels=$?
    [[ ${kernels:-5} = 5 ]] || exit $kernels
    [[ -z ${library:-} || -z ${kernels:-} ]] || exit 5  # neither had any

# The inner loop: lint, types, and the tests that the working tree's changes concern; since another commit, if named.
test-quick since="HEAD": lint
    OMP_NUM_THREADS=1 {{python}} tests/support/changed.py {{since}} | xargs -r {{python}} -m pytest -q -n auto -m "not slow"
    TRITON_INTERPRET=1 OMP_NUM_THREADS=1 {{python}} tests/support/changed.py --kernels {{since}} \
        | xargs -r {{python}} -m pytest -q -n auto -m "not slow"

# The tests, and those that take over a minute.
test-all *args:
    {{just_executable()}} test -m '' "$@"

# Lint, format check and types.
lint:
    {{python}} -m ruff check .
    {{python}} -m ruff format --check .
    {{python}} -m pyright --pythonpath {{python}}

# Rewrite the sources in the project's format.
format:
    {{python}} -m ruff check --fix .
    {{python}} -m ruff format .

# Time training steps, attaching, saving and loading of each variant beside PEFT's.
bench-adapters *args:
    {{python}} bench/training/adapters.py "$@"

# Compile every kernel for six architectures and read registers, spills, shared memory, instructions. No GPU is needed.
kernels-report *args:
    {{python}} bench/kernels/kernels_report.py "$@"

# On a GPU, times of kernels and layers beside rivals; without one, the bytes they move, counted.
bench-kernels *args: device-model
    {{python}} bench/kernels/block.py
    {{python}} bench/kernels/kernel_bench.py "$@"

# The device time of each adapter's step on five GPUs, modelled from real grids and compiled kernels.
device-model *args:
    {{python}} bench/kernels/device_model.py "$@"

# CPU time and launches that an adapted layer adds to a step, beside PEFT's. No GPU is needed.
bench-host *args:
    {{python}} bench/kernels/host.py "$@"

# On a machine with a GPU, and no network: every kernel checked, layers and a model timed, in nine minutes.
gpu-day *args:
    bench/kernels/gpu-day "$@"

# Collect in .gpu-day/ the wheels that such a machine may lack, to be carried there with the sources.
gpu-day-bundle:
    PYTHON={{python}} bench/kernels/gpu-day bundle

# Build the wheel and the sdist into dist/ and check their metadata.
build:
    rm -rf dist build
    {{python}} -m build --quiet
    {{python}} -m twine check --strict dist/*

# Everything: lint, types, tests, build, and the wheel in an empty environment.
check: lint test build
    tests/support/empty_environment dist/*.whl
