#!/usr/bin/env bash
# Train on a Slurm cluster, on one node or many, over preemption and the limit of time:
#
#     sbatch examples/slurm.sh dsmoe-s-e16 --data.path /data/imagenet-latents
#     sbatch --nodes 4 examples/slurm.sh dsmoe-l-e16 --data.path /data/imagenet-latents
#     RUN=/scratch/me/try GPUS=4 sbatch --gpus-per-node 4 examples/slurm.sh my-recipe.yaml --optimizer.learning_rate 2e-4
#
# What follows the recipe are options of `diffusion-moe train`; later ones win over those below. What `sbatch` is given
# wins over the lines that begin with #SBATCH. The same line again goes on with the same run.
#
#SBATCH --job-name=diffusion-moe
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
# This script, and nothing else, is told two minutes before the time is over.
#SBATCH --signal=B:TERM@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.out

set -uo pipefail

recipe=${1:?usage: sbatch slurm.sh RECIPE [--option value ...]}
shift
name=$(basename "$recipe")
nodes=$SLURM_JOB_NUM_NODES
gpus=${GPUS:-${SLURM_GPUS_ON_NODE:-8}}
# On a file system that all nodes share: checkpoints are written by all processes.
run=${RUN:-runs/${name%.yaml}}

# Where models and data sets from the hub are kept; shared too, or filled on each node beforehand. Compute nodes often
# have no network: download on a login node, and tell the libraries not to look.
export HF_HOME=${HF_HOME:-$HOME/.cache/huggingface}
export HF_HUB_OFFLINE=${HF_HUB_OFFLINE:-1}
export HF_DATASETS_OFFLINE=${HF_DATASETS_OFFLINE:-1}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-8}
# How long torchrun waits for its processes to save before it kills them (30 s unless told). A little less than the
# script has, a little more than training.stop_seconds below.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=110
# A store of its own for every start, so that a node that has taken another's place is found.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1

head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
port=$((20000 + SLURM_JOB_ID % 20000))

# One torchrun a node; it starts a process a GPU. Weights are spread within a node, copies stand on the nodes.
launch=(
    torchrun
    --nnodes "$nodes"
    --nproc-per-node "$gpus"
    --max-restarts 3
    --rdzv-id "$SLURM_JOB_ID"
    --rdzv-backend c10d
    --rdzv-endpoint "$head:$port"
)
train=(
    -m diffusion_moe train "$recipe"
    --output_dir "$run"
    --parallel.replicate "$nodes"
    --parallel.shard "$gpus"
    --training.stop_seconds 100
    "$@"
)

asked=
# To the processes of the step: all save together and end.
trap 'asked=1; scancel --signal=TERM "$SLURM_JOB_ID.0"' TERM

srun "${launch[@]}" "${train[@]}" &
step=$!
wait "$step"
status=$?
# A signal ends `wait`, not what it waits for.
while [[ $status -gt 128 ]] && kill -0 "$step" 2>/dev/null; do
    wait "$step"
    status=$?
done

# torchrun ends with 1 whatever its processes end with, so that it is the signal that tells what to do. If training came
# to its end all the same, there is nothing left to do.
if [[ -n $asked && $status -ne 0 ]]; then
    scontrol requeue "$SLURM_JOB_ID"
    exit 143
fi
exit "$status"
