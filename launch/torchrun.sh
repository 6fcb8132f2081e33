#!/usr/bin/env bash
# Run vp-train over all GPUs of one or several nodes.  On every node:
#   HEAD=node0 NODES=2 NODE=0 GPUS=8 launch/torchrun.sh model=small run.device=cuda run.name=first
set -euo pipefail
: "${HEAD:=127.0.0.1}" "${PORT:=29500}" "${NODES:=1}" "${NODE:=0}" "${GPUS:=4}"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
# Every connection and every file needs a descriptor, so raise the limit.  If a node has several
# networks, set NCCL_SOCKET_IFNAME and GLOO_SOCKET_IFNAME.
ulimit -S -n "$(ulimit -H -n)" || true
# If no environment is activated, use the one that `make` builds.
torchrun=$(command -v torchrun || echo "$(dirname "${BASH_SOURCE[0]}")/../.venv/bin/torchrun")
exec "$torchrun" --nnodes "$NODES" --node-rank "$NODE" --nproc-per-node "$GPUS" \
  --master-addr "$HEAD" --master-port "$PORT" -m vp_train "$@"
