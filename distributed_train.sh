#!/usr/bin/env bash
# train_distill on N processes of this machine, one a GPU (nccl) or, with --device cpu, on the CPU (gloo):
#   ./distributed_train.sh 8 DATA --teacher resnet34 --model resnet18 --pe-projectors 3
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
python="${PYTHON:-python}"
command -v "$python" >/dev/null || python=python3
exec "$python" -m torch.distributed.run --standalone --nproc-per-node="$num_processes" \
    "$(dirname "$0")/train_distill.py" "$@"
