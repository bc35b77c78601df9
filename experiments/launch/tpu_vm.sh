#!/usr/bin/env bash
# A TPU slice of Cloud TPU VMs, from creation to deletion. NOT RUN by the authors: no TPU at hand.
#   PROJECT=... ZONE=us-west4-a BUCKET=my-bucket experiments/launch/tpu_vm.sh \
#     --config=experiments/launch/pod.py:l16
# The bucket is mounted on every host at /mnt/bucket; it holds the prepared dataset and the runs.
set -euo pipefail
: "${PROJECT:?}" "${ZONE:?}" "${BUCKET:?}"
NAME="${NAME:-vit-jax}"
TYPE="${TYPE:-v5litepod-256}"                  # v5e:16x16
VERSION="${VERSION:-v2-alpha-tpuv5-lite}"
SOURCE="${SOURCE:?an address that git can clone}"

tpu() { gcloud compute tpus tpu-vm "$@" --project="$PROJECT" --zone="$ZONE"; }
everywhere() { tpu ssh "$NAME" --worker=all --command="$1"; }

tpu create "$NAME" --accelerator-type="$TYPE" --version="$VERSION"
everywhere "git clone '$SOURCE' vit_jax && cd vit_jax && python3 -m venv .venv &&
  .venv/bin/pip install -q -e '.[tpu]' &&
  sudo mkdir -p /mnt/bucket && sudo chown \$USER /mnt/bucket &&
  gcsfuse --implicit-dirs '$BUCKET' /mnt/bucket"

# Nothing is said of the other hosts: JAX finds them by the slice's metadata.
everywhere "cd vit_jax && JAX_COMPILATION_CACHE_DIR=/mnt/bucket/compiled \
  .venv/bin/python -m vit_jax.main $* \
  --config.data.data_dir=/mnt/bucket/tfds --workdir=/mnt/bucket/runs/$NAME"

echo "to stop paying: gcloud compute tpus tpu-vm delete $NAME --project=$PROJECT --zone=$ZONE"
