# shellcheck shell=bash
# Environment of a rank, each variable with its reason.  The launch scripts read it; in your own:
#   HEAD=node0 . launch/env.sh
# What you have set stays.  vp-train itself sets CUDA_DEVICE_MAX_CONNECTIONS, PYTORCH_ALLOC_CONF,
# NCCL_MAX_P2P_NCHANNELS, NCCL_RUNTIME_CONNECT, TORCHINDUCTOR_COMPILE_THREADS and torch's flight
# recorder (docs/cluster.md).

# Ranks share the cores of their node.  More threads per rank would only take turns.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"

# Every connection and every file needs a descriptor, and the usual limit is 1,024.
ulimit -S -n "$(ulimit -H -n)" 2>/dev/null || true

# RDMA pins the memory that it sends from.  Without this right NCCL fails in the first message.
ulimit -S -l "$(ulimit -H -l)" 2>/dev/null || true

# GPUs are numbered by their place on the bus, as in nvidia-smi, so that a rank has the same GPU in
# every start and its links to network cards are those that NCCL finds.
export CUDA_DEVICE_ORDER="${CUDA_DEVICE_ORDER:-PCI_BUS_ID}"

# NCCL says why it fails only at this level.
export NCCL_DEBUG="${NCCL_DEBUG:-WARN}"

# A switch that reroutes needs seconds.  4.096 us x 2^22 = 17 s per try, 7 tries: below
# run.timeout_seconds, above what InfiniBand takes to find another path.
export NCCL_IB_TIMEOUT="${NCCL_IB_TIMEOUT:-22}"

# Kernels are compiled once per node into a directory of the node.  In a home on the network, ranks
# of many nodes would wait for one another's locks.
export TRITON_CACHE_DIR="${TRITON_CACHE_DIR:-${TMPDIR:-/tmp}/triton-$(id -u)}"
export TORCHINDUCTOR_CACHE_DIR="${TORCHINDUCTOR_CACHE_DIR:-${TMPDIR:-/tmp}/inductor-$(id -u)}"

# gloo uses the address that the host's name stands for, often 127.0.1.1, and NCCL the first network
# it finds, which may be a container's bridge.  Both should use the network that leads to the head;
# its interface may have another name on every node.  InfiniBand cards are found by NCCL itself
# (NCCL_IB_HCA chooses among them).
vp_interface_to() {
    # Print the name of the interface that leads to address or host $1.
    command -v ip >/dev/null || return 0
    vp_address=$(getent ahostsv4 "$1" 2>/dev/null | awk 'NR == 1 { print $1 }') || true
    # On the head itself the way is the loopback interface, so ask who has the address.
    vp_interface=$(ip -o -4 address show to "${vp_address:-$1}" 2>/dev/null \
        | awk 'NR == 1 { print $2 }') || true
    if [ -z "$vp_interface" ]; then
        vp_interface=$(ip -o -4 route get "${vp_address:-$1}" 2>/dev/null \
            | sed -n 's/.* dev \([^ ]*\).*/\1/p') || true
    fi
    printf '%s' "$vp_interface"
    unset vp_address vp_interface
}

# A job of one node stays on the loopback interface, which vp-train sees to.
if [ -n "${HEAD:-}" ] && [ "${NODES:-${SLURM_JOB_NUM_NODES:-}}" != 1 ] \
    && [ -z "${GLOO_SOCKET_IFNAME:-}${NCCL_SOCKET_IFNAME:-}" ]; then
    vp_found=$(vp_interface_to "${HEAD%%:*}")
    if [ -n "$vp_found" ]; then
        export GLOO_SOCKET_IFNAME="$vp_found" NCCL_SOCKET_IFNAME="$vp_found"
    fi
    unset vp_found
fi
