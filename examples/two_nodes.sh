#!/usr/bin/env bash
# Train on two machines that see the same folders. On each of them: examples/two_nodes.sh FIRST_HOST DATA RUN [options]
# Not yet tried on two machines; two processes of one are tested.
set -euo pipefail
first=$1 data=$2 run=$3
shift 3
exec torchrun --nnodes 2 --nproc-per-node gpu --rdzv-id "$run" --rdzv-backend c10d --rdzv-endpoint "$first:29500" \
    -m diffkit train "$data" -o "$run" "$@"
