#!/usr/bin/env bash
# Two nodes on one machine: network namespaces, joined by a link of a limited rate, and torchrun across them.
#
#   benchmarks/two_nodes.sh [--rate MBIT] [--rounds N] [--steps N] [--only CASE ...] [--record]
#
# Needs root, iproute2 and the kernel's tbf; says what is missing and leaves with 0 where one is. What is measured, and
# how, is in two_nodes.py, which gets the options. PYTHON chooses the interpreter. The link has no delay of its own.
set -euo pipefail

cd "$(dirname "$0")/.."
python=${PYTHON:-.venv/bin/python}
[ -x "$python" ] || python=$(command -v "$python" || command -v python3)

# Names of this run alone: several may run at once. Inside a node names and addresses are nobody else's.
nodes=("shardwright-$$-0" "shardwright-$$-1")
addresses=(10.77.0.1 10.77.0.2)
link=link0
port=29577
folder=
started=()

stop() { # what this run started, by number: politely, and what stays after 15 s for good
    local pid
    for pid in "${started[@]}"; do kill -TERM "$pid" 2>/dev/null || true; done
    for _ in $(seq 150); do
        [ -n "$(inside)" ] || break
        sleep 0.1
    done
    for pid in $(inside); do kill -KILL "$pid" 2>/dev/null || true; done
    started=()
}

inside() { # the processes in the nodes
    local node
    for node in "${nodes[@]}"; do ip netns pids "$node" 2>/dev/null || true; done
}

leave() {
    local code=$?
    trap - EXIT
    trap '' INT TERM HUP # once is enough
    stop
    for node in "${nodes[@]}"; do ip netns delete "$node" 2>/dev/null || true; done # its interfaces go with it
    [ -z "$folder" ] || rm -rf "$folder"
    exit "$code"
}

skip() {
    echo "benchmarks/two_nodes.sh: skipped: $1"
    exit 0
}

case " $* " in *" --help "* | *" -h "*) exec "$python" -m benchmarks.two_nodes --help ;; esac
[ "$(id -u)" = 0 ] || skip "network namespaces need root"
for tool in ip tc; do
    command -v "$tool" >/dev/null || skip "there is no $tool: iproute2 is not installed"
done

read -r rate worlds <<<"$("$python" -m benchmarks.two_nodes setting "$@" || echo "")"
[ -n "$rate" ] || exit 2 # it has said why

trap leave EXIT
trap 'exit 130' INT
trap 'exit 143' TERM
trap 'exit 129' HUP

for node in "${nodes[@]}"; do
    ip netns add "$node" || skip "this kernel or container does not allow network namespaces"
done
ip link add "$link" netns "${nodes[0]}" type veth peer name "$link" netns "${nodes[1]}" ||
    skip "this kernel has no virtual ethernet (veth)"
for i in 0 1; do
    ip -n "${nodes[i]}" address add "${addresses[i]}/24" dev "$link"
    ip -n "${nodes[i]}" link set lo up
    ip -n "${nodes[i]}" link set "$link" up
    # Ranks of one node use the node's address too: the kernel takes such packets over the loopback, past this.
    tc -n "${nodes[i]}" qdisc add dev "$link" root tbf rate "${rate}mbit" burst 128kb latency 100ms ||
        skip "this kernel has no token bucket filter (tbf)"
done

folder=$(mktemp -d)
export OMP_NUM_THREADS=1 GLOO_SOCKET_IFNAME=$link
export TORCH_CPP_LOG_LEVEL=ERROR # the addresses have no names, of which torch would warn at every connection
export LOGLEVEL=CRITICAL # the second agent logs an error when the first, which holds their store, leaves before it
for world in $worlds; do
    for i in 0 1; do
        # setsid: a Ctrl-C reaches this script alone, which then stops them in order
        ip netns exec "${nodes[i]}" setsid "$python" -m torch.distributed.run \
            --nnodes 2 --nproc-per-node $((world / 2)) --node-rank "$i" \
            --master-addr "${addresses[0]}" --master-port "$port" \
            -m benchmarks.two_nodes rank --folder "$folder" "$@" &
        started+=($!)
    done
    code=0
    for _ in 0 1; do wait -n || { code=$?; break; }; done
    [ "$code" = 0 ] || { echo "benchmarks/two_nodes.sh: a node failed" >&2; exit 1; }
    started=()
done
for i in 0 1; do
    echo "node $i: $(tc -s -n "${nodes[i]}" qdisc show dev "$link" | grep -o 'Sent.*')" >&2
done
"$python" -m benchmarks.two_nodes report --folder "$folder" "$@"
