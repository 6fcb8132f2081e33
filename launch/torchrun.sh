#!/usr/bin/env bash
# Run vp-train over all GPUs of one or several nodes.  On every node:
#   HEAD=node0 NODES=2 NODE=0 GPUS=8 launch/torchrun.sh model=small run.device=cuda run.name=first
set -euo pipefail
: "${PORT:=29500}" "${NODES:=1}" "${GPUS:=4}"
place=()
if [ "$NODES" != 1 ]; then
  if [ -z "${HEAD:-}" ] || [ -z "${NODE:-}" ]; then
    echo "vp_train: NODES=$NODES needs HEAD, the address of node 0, and NODE, 0 on that one" >&2
    exit 78
  fi
  place=(--nodes "$NODES" --node "$NODE" --head "$HEAD:$PORT")
fi
here=$(dirname "${BASH_SOURCE[0]}")
# shellcheck source-path=SCRIPTDIR
. "$here/env.sh"
# If no environment is activated, use the one that `make` builds.
train=$(command -v vp-train || echo "$here/../.venv/bin/vp-train")
exec "$train" "${place[@]}" --ranks "$GPUS" "$@"
