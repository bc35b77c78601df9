#!/usr/bin/env bash
# One process a GPU, four nodes of eight: sbatch experiments/launch/slurm.sh --config=... --workdir=...
# JAX reads from SLURM who and where the others are. NOT RUN by the authors: no cluster at hand.
#SBATCH --job-name=vit_jax
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=12
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@180
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm-%j.log
set -u
source .venv/bin/activate
# Compiled once, by whichever job comes first; a restart then begins in seconds.
export JAX_COMPILATION_CACHE_DIR="${JAX_COMPILATION_CACHE_DIR:-$PWD/runs/compiled}"
export XLA_PYTHON_CLIENT_MEM_FRACTION=0.92

# Every task sees all GPUs of its node and takes the one of its local rank: JAX's own rule, which a
# binding of one GPU to each task would break. All tasks end when one does.
srun --gpu-bind=none --kill-on-bad-exit=1 \
  python -m vit_jax.main "$@"
status=$?

# 143: stopped by a signal with everything saved; 1 and 134: a process died or hung. The same
# command goes on where it stopped. Other statuses are for a person: config, data, divergence.
case $status in
  1 | 134 | 137 | 143)
    if [ "${SLURM_RESTART_COUNT:-0}" -lt 20 ]; then
      scontrol requeue "$SLURM_JOB_ID"
    fi
    ;;
esac
exit $status
