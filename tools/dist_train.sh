#!/usr/bin/env bash
# Trains on GPUS devices of this machine, or on GPUS processes where it has no accelerator.
# Over several machines, on each, with NODE_RANK=0, 1, ...: NNODES=2 NODE_RANK=0 MASTER_ADDR=10.0.0.1
# Two runs on one machine need two ports. PYTHON names the interpreter.
set -euo pipefail

if [ $# -lt 2 ]; then
    echo "usage: tools/dist_train.sh CONFIG GPUS [options of tools/train.py]" >&2
    exit 2
fi
if ! [[ $2 =~ ^[1-9][0-9]*$ ]]; then
    echo "error: GPUS is '$2': it must be a number of GPUs (or of processes, without any), 1 or more" >&2
    exit 2
fi

ROOT=$(cd "$(dirname "$0")/.." && pwd)
if [ -z "${PYTHON:-}" ]; then
    PYTHON=python
    if [ -z "${VIRTUAL_ENV:-}${CONDA_PREFIX:-}" ] && [ -x "$ROOT/.venv/bin/python" ]; then
        PYTHON=$ROOT/.venv/bin/python
    fi
fi
CONFIG=$1
GPUS=$2
shift 2

export PYTHONPATH=$ROOT${PYTHONPATH:+:$PYTHONPATH}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
exec "$PYTHON" -m torch.distributed.run \
    --nnodes="${NNODES:-1}" \
    --node_rank="${NODE_RANK:-0}" \
    --master_addr="${MASTER_ADDR:-127.0.0.1}" \
    --nproc_per_node="$GPUS" \
    --master_port="${PORT:-29500}" \
    "$ROOT/tools/train.py" "$CONFIG" --launcher pytorch "$@"
