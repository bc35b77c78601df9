#!/usr/bin/env bash
# A workload on a GKE cluster that xpk has made. NOT RUN by the authors: no cluster at hand.
#   PROJECT=... ZONE=... CLUSTER=... IMAGE=... experiments/launch/xpk.sh \
#     --config=experiments/launch/pod.py:h14 --config.data.data_dir=/data/tfds --workdir=/data/runs/h14
# The image holds the repository at /app, installed with its extra `tpu`; /data is a bucket or a
# file store attached to the cluster (xpk storage attach).
set -euo pipefail
: "${PROJECT:?}" "${ZONE:?}" "${CLUSTER:?}" "${IMAGE:?}"
NAME="${NAME:-vit-jax}"
TYPE="${TYPE:-v5p-1024}"                       # v5p:8x8x8: the type counts cores, two a chip
SLICES="${SLICES:-1}"

# A preempted or crashed slice is started again, and goes on from its last checkpoint.
xpk workload create \
  --project="$PROJECT" --zone="$ZONE" --cluster="$CLUSTER" \
  --workload="$NAME" --tpu-type="$TYPE" --num-slices="$SLICES" --max-restarts=20 \
  --docker-image="$IMAGE" \
  --command="cd /app && JAX_COMPILATION_CACHE_DIR=/data/compiled python -m vit_jax.main $*"

echo "to look: xpk workload list --cluster=$CLUSTER; to end it: xpk workload delete --workload=$NAME --cluster=$CLUSTER"
