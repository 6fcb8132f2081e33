#!/bin/sh
# Collect the wheels that a GPU machine without a network needs, for Python 3.12 on x86-64 Linux:
#
#     benchmarks/gpu_wheels.sh DIR            # here, with a network
#     pip install --no-index --no-deps --target SITE DIR/*.whl && export PYTHONPATH=SITE    # there
#
# The machine must have torch 2.11, triton 3.6 and transformers with their dependencies: neither
# torch nor NVIDIA's packages are downloaded.  Versions are those of constraints.txt.  PYTHON
# (default: .venv/bin/python) must have torch and setuptools.  The setup of deepspeed imports torch,
# but nothing is compiled.
set -eu
cd "$(dirname "$0")/.."
[ $# -eq 1 ] || { echo "usage: $0 DIR" >&2; exit 64; }
MAX_BYTES=64000000
PYTHON=${PYTHON:-.venv/bin/python}
mkdir -p "$1"
DIR=$(cd "$1" && pwd)
if ls "$DIR"/*.whl > /dev/null 2>&1; then
    echo "$DIR already has wheels; give an empty directory, since pip refuses two versions" >&2
    exit 64
fi

# Only sources of these are published.  They contain nothing to compile.
SOURCES="antlr4-python3-runtime deepspeed"
# vp_train, megatron-core and deepspeed at run time
WHEELS="megatron-core hydra-core omegaconf PyYAML rich markdown-it-py mdurl Pygments
    einops hjson msgpack ninja psutil py-cpuinfo pydantic pydantic_core annotated-types
    typing-inspection typing_extensions
    tensorboard absl-py Markdown protobuf Werkzeug MarkupSafe"
# the tests
WHEELS="$WHEELS pytest pytest-timeout pytest-xdist execnet pluggy iniconfig hypothesis
    sortedcontainers"
# the peers of the vocabulary passes
WHEELS="$WHEELS liger-kernel cut-cross-entropy"

pinned() {
    version=$(sed -n "s/^$1==//p" constraints.txt)
    [ -n "$version" ] || { echo "constraints.txt has no $1; add it there" >&2; exit 65; }
    echo "$1==$version"
}

for name in $SOURCES; do
    requirement=$(pinned "$name")
    DS_BUILD_OPS=0 "$PYTHON" -m pip wheel --quiet --no-deps --no-build-isolation \
        --wheel-dir "$DIR" "$requirement"
done
requirements=""
for name in $WHEELS; do requirements="$requirements $(pinned "$name")"; done
platforms=""
for tag in 2_5 2_12 2_17 2_24 2_26 2_27 2_28; do
    platforms="$platforms --platform manylinux_${tag}_x86_64"
done
for tag in 2014 2010 1; do platforms="$platforms --platform manylinux${tag}_x86_64"; done
# shellcheck disable=SC2086 - lists of words
"$PYTHON" -m pip download --quiet --no-deps --only-binary :all: --python-version 3.12 \
    --implementation cp $platforms --dest "$DIR" $requirements

bytes=$(cat "$DIR"/*.whl | wc -c)
echo "$(ls "$DIR"/*.whl | wc -l) wheels, $((bytes / 1000)) kB in $DIR"
[ "$bytes" -le $MAX_BYTES ] || { echo "more than $MAX_BYTES bytes; leave some out" >&2; exit 1; }
