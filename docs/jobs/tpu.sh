#!/usr/bin/env bash
# GPT-2 XL on a TPU slice of several hosts, one process per host:
#
#   ZONE=us-east5-a RUN_DIR=/mnt/shared/runs/xl bash docs/jobs/tpu.sh my-v5p-32
#
# `tjx-train` must be installed on every host, and RUN_DIR must be on storage that all hosts mount, such
# as Filestore. JAX detects the hosts of the slice. The same command resumes the run; --supervise
# restarts it after a crash on all hosts.
set -euo pipefail

name="${1:?pass the name of the TPU as argument}"
: "${ZONE:?set it to the zone of the TPU}" "${RUN_DIR:?set it to a folder that all hosts mount}"

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
