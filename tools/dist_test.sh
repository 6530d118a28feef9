#!/usr/bin/env bash
# Tests on GPUS devices of this machine, or on GPUS processes where it has no accelerator.
# Over several machines, on each, with NODE_RANK=0, 1, ...: NNODES=2 NODE_RANK=0 MASTER_ADDR=10.0.0.1
# Two runs on one machine need two ports. PYTHON names the interpreter.
set -euo pipefail

if [ $# -lt 3 ]; then
    echo "usage: tools/dist_test.sh CONFIG CHECKPOINT GPUS [options of tools/test.py]" >&2
    exit 2
fi
if ! [[ $3 =~ ^[1-9][0-9]*$ ]]; then
    echo "error: GPUS is '$3': it must be a number of GPUs (or of processes, without any), 1 or more" >&2
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
CHECKPOINT=$2
GPUS=$3
shift 3

export PYTHONPATH=$ROOT${PYTHONPATH:+:$PYTHONPATH}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
exec "$PYTHON" -m torch.distributed.run \
    --nnodes="${NNODES:-1}" \
    --node_rank="${NODE_RANK:-0}" \
    --master_addr="${MASTER_ADDR:-127.0.0.1}" \
    --nproc_per_node="$GPUS" \
    --master_port="${PORT:-29500}" \
    "$ROOT/tools/test.py" "$CONFIG" "$CHECKPOINT" --launcher pytorch "$@"
