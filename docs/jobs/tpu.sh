#!/usr/bin/env bash
# GPT-2 XL on a TPU slice of several hosts, one process a host:
#
#   ZONE=us-east5-a RUN_DIR=/mnt/shared/runs/xl bash docs/jobs/tpu.sh my-v5p-32
#
# `tjx-train` is installed on every host, and RUN_DIR lies on storage that all of them mount, such as
# Filestore. JAX finds the hosts of the slice by itself. The same command goes on with the run; what
# crashes in between starts again by itself (--supervise), and all hosts go on together.
set -euo pipefail

name="${1:?give the name of the TPU}"
: "${ZONE:?give its zone}" "${RUN_DIR:?give a folder that all hosts mount}"

command=(
  tjx-train --config gpt2_xl
  --mesh.fsdp -1 --mesh.data 1
  --run_dir "$RUN_DIR"
  --data.cache_dir "$(dirname "$RUN_DIR")/data"
  --distributed.heartbeat_timeout 60
  --supervise
)
gcloud compute tpus tpu-vm ssh "$name" --zone "$ZONE" --worker=all \
  --command "$(printf '%q ' "${command[@]}")"
