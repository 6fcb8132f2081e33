#!/bin/sh
# Collect what a GPU machine without a network lacks, as wheels for Python 3.12 on x86-64 Linux:
#
#     benchmarks/gpu_wheels.sh DIR            # here, with a network
#     pip install --no-index --no-deps --target SITE DIR/*.whl && export PYTHONPATH=SITE    # there
#
# The machine is expected to have torch 2.11, triton 3.6 and transformers with what these need;
# neither torch nor anything of NVIDIA is downloaded.  Versions are those of constraints.txt, or the
# ones below where it pins none.  PYTHON (default: .venv/bin/python) has torch and setuptools:
# deepspeed's setup wants torch, though nothing is compiled.
set -eu
cd "$(dirname "$0")/.."
[ $# -eq 1 ] || { echo "usage: $0 DIR" >&2; exit 64; }
MAX_BYTES=64000000
PYTHON=${PYTHON:-.venv/bin/python}
mkdir -p "$1"
DIR=$(cd "$1" && pwd)
if ls "$DIR"/*.whl > /dev/null 2>&1; then
    echo "$DIR has wheels already; give an empty directory, for two versions stop the installation" >&2
    exit 64
fi

# Nothing of these is compiled, but only their sources are published.
SOURCES="antlr4-python3-runtime deepspeed"
# vp_train, megatron-core and deepspeed at run time
WHEELS="megatron-core hydra-core omegaconf PyYAML rich markdown-it-py mdurl Pygments
    einops hjson msgpack ninja psutil py-cpuinfo pydantic pydantic_core annotated-types typing-inspection typing_extensions
    tensorboard absl-py Markdown protobuf Werkzeug MarkupSafe"
# the tests
WHEELS="$WHEELS pytest pytest-timeout pytest-xdist execnet pluggy iniconfig hypothesis sortedcontainers"
# the peers of the vocabulary passes
PEERS="liger-kernel==0.8.5 cut-cross-entropy==25.1.1"

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
requirements=$PEERS
for name in $WHEELS; do requirements="$requirements $(pinned "$name")"; done
platforms=""
for minor in 5 12 17 24 26 27 28; do platforms="$platforms --platform manylinux_2_${minor}_x86_64"; done
# shellcheck disable=SC2086 - lists of words
"$PYTHON" -m pip download --quiet --no-deps --only-binary :all: --python-version 3.12 --implementation cp \
    $platforms --platform manylinux2014_x86_64 --platform manylinux2010_x86_64 --platform manylinux1_x86_64 \
    --dest "$DIR" $requirements

bytes=$(cat "$DIR"/*.whl | wc -c)
echo "$(ls "$DIR"/*.whl | wc -l) wheels, $((bytes / 1000)) kB in $DIR"
[ "$bytes" -le $MAX_BYTES ] || { echo "more than $MAX_BYTES bytes; leave some out" >&2; exit 1; }
