#!/usr/bin/env bash
# Run vp-train over all GPUs of one or several nodes.  On every node:
#   HEAD=node0 NODES=2 NODE=0 GPUS=8 launch/torchrun.sh model=small run.device=cuda run.name=first
set -euo pipefail
: "${HEAD:=127.0.0.1}" "${PORT:=29500}" "${NODES:=1}" "${NODE:=0}" "${GPUS:=4}"
here=$(dirname "${BASH_SOURCE[0]}")
# shellcheck source-path=SCRIPTDIR
. "$here/env.sh"
# If no environment is activated, use the one that `make` builds.
torchrun=$(command -v torchrun || echo "$here/../.venv/bin/torchrun")
exec "$torchrun" --nnodes "$NODES" --node-rank "$NODE" --nproc-per-node "$GPUS" \
  --master-addr "$HEAD" --master-port "$PORT" -m vp_train "$@"
