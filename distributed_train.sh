#!/usr/bin/env bash
# train_distill on N processes of each machine, one a GPU (nccl) or, with --device cpu, on the CPU (gloo):
#   ./distributed_train.sh 8 DATA --teacher resnet34 --model resnet18 --pe-projectors 3
# More than one machine, the same line on each: NNODES=2 NODE_RANK=0 RDZV_ENDPOINT=host:29500 ./distributed_train.sh 8 ...
# (torchrun's --nnodes, --node-rank and --rdzv-endpoint; RDZV_ID tells jobs on one host apart, MAX_RESTARTS restarts ranks)
set -euo pipefail
if [[ $# -lt 1 || ! "$1" =~ ^[1-9][0-9]*$ ]]; then
    echo "usage: $0 NUM_PROCESSES [train_distill arguments]" >&2
    exit 2
fi
num_processes=$1
shift
# torchrun's own default is 1 thread a process: share the cores instead
if [[ -z "${OMP_NUM_THREADS:-}" ]]; then
    threads=$(($(getconf _NPROCESSORS_ONLN) / num_processes))
    export OMP_NUM_THREADS=$((threads > 0 ? threads : 1))
fi
if [[ "${NNODES:-1}" != 1 ]]; then
    if [[ -z "${RDZV_ENDPOINT:-}" ]]; then
        echo "$0: NNODES=$NNODES needs RDZV_ENDPOINT=HOST:PORT, where the machines meet" >&2
        exit 2
    fi
    where=(--nnodes="$NNODES" --node-rank="${NODE_RANK:-0}" --rdzv-backend=c10d --rdzv-endpoint="$RDZV_ENDPOINT"
        --rdzv-id="${RDZV_ID:-train_distill}")
else
    where=(--standalone)
fi
# ranks that are restarted would else read the addresses of those that died (pytorch/pytorch#135712)
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE="${TORCH_DISABLE_SHARE_RDZV_TCP_STORE:-1}"
python="${PYTHON:-python}"
command -v "$python" >/dev/null || python=python3
exec "$python" -m torch.distributed.run "${where[@]}" --nproc-per-node="$num_processes" \
    --max-restarts="${MAX_RESTARTS:-0}" "$(dirname "$0")/train_distill.py" "$@"
