#!/usr/bin/env bash
# Train on a Slurm cluster, on one or more nodes, resuming after preemption and the time limit:
#
#     sbatch examples/slurm.sh dsmoe-s-e16 --data.path /data/imagenet-latents
#     sbatch --nodes 4 examples/slurm.sh dsmoe-l-e16 --data.path /data/imagenet-latents
#     RUN=/scratch/me/try GPUS=4 sbatch --gpus-per-node 4 examples/slurm.sh my-recipe.yaml --optimizer.learning_rate 2e-4
#
# Options after the recipe are those of `diffusion-moe train` and override those below. Options of `sbatch` override the
# lines that begin with #SBATCH. The same command again resumes the run.
#
#SBATCH --job-name=diffusion-moe
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
# Only this script gets the signal, two minutes before the time limit.
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

# Cache of models and data sets from the hub; shared too, or filled on each node before. Compute nodes often have no
# network: download on a login node, and keep the libraries offline.
export HF_HOME=${HF_HOME:-$HOME/.cache/huggingface}
export HF_HUB_OFFLINE=${HF_HUB_OFFLINE:-1}
export HF_DATASETS_OFFLINE=${HF_DATASETS_OFFLINE:-1}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-8}
# Seconds that torchrun waits for its processes to save before it kills them (default 30). A little less than the
# script has, a little more than training.stop_seconds below.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=110
# A new store for every start, so that a replaced node is found.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1

head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
port=$((20000 + SLURM_JOB_ID % 20000))

# One torchrun per node; it starts a process for each GPU. Weights are sharded within a node and replicated over nodes.
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
# To the processes of the job step: all save together and end.
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

# torchrun always ends with 1, so the signal decides whether to requeue. If training finished nevertheless (status 0),
# there is nothing left to do.
if [[ -n $asked && $status -ne 0 ]]; then
    scontrol requeue "$SLURM_JOB_ID"
    exit 143
fi
exit "$status"
