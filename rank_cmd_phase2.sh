#!/usr/bin/env bash
# Instruction tuning: this node's share of the job. Run it once on every node, with NODE_RANK 0 .. NODE_CNT - 1:
#
#     bash rank_cmd_phase2.sh NODE_RANK NODE_CNT MASTER MASTER_PORT TP PP MBSZ LOGDIR
#
# MASTER and MASTER_PORT are node 0's address and a free port on it, TP and PP the tensor- and pipeline-parallel sizes,
# MBSZ the micro-batch size. Without a GPU it runs on the CPU. The model (sizes, muP constants) is the checkpoint's.
# From the environment, with the reference's hyper-parameters as defaults:
#
#     LOAD               checkpoint to start from: Megatron of any TP and PP, or Hugging Face (default: see below)
#     SAVE               where the run goes, and goes on from when started again (default: see below)
#     DATA_PATH          processed .jsonl or .h5 rows, or a directory of them (default: data/instruct.jsonl)
#     ITERS              optimizer steps (default: 1600)
#     GLOBAL_BATCH_SIZE  rows per step (default: 1024)     SEQ_LENGTH     tokens per row (default: 2048)
#     GPUS_PER_NODE      processes on this node (default: its GPUs; on a CPU TP x PP / NODE_CNT)
#     MAX_RESTARTS       how often the job goes on from its last checkpoint when a rank or a node dies (default: 3)
#     EXTRA_ARGS         more flags of pretrain_crystalcoder_inst.py; of a flag given twice the last counts
#
# A node that died joins again when its call is made again; the others wait for it.
# GPUs run in bf16, a CPU in fp32. LOGDIR gets node_<rank>.log and TensorBoard files.
set -euo pipefail

if [ $# -ne 8 ]; then
    echo "usage: bash rank_cmd_phase2.sh NODE_RANK NODE_CNT MASTER MASTER_PORT TP PP MBSZ LOGDIR" >&2
    exit 2
fi
NODE_RANK=$1 NODE_CNT=$2 MASTER=$3 MASTER_PORT=$4 TP=$5 PP=$6 MBSZ=$7 LOGDIR=$8
for number in "$NODE_RANK" "$NODE_CNT" "$MASTER_PORT" "$TP" "$PP" "$MBSZ"; do
    case $number in
        '' | *[!0-9]*)
            echo "error: '$number' is not a number: NODE_RANK, NODE_CNT, MASTER_PORT, TP, PP and MBSZ must be" >&2
            exit 2
            ;;
    esac
done
for number in "$NODE_CNT" "$TP" "$PP" "$MBSZ"; do
    if [ "$number" -eq 0 ]; then
        echo "error: NODE_CNT, TP, PP and MBSZ must be at least 1" >&2
        exit 2
    fi
done
if [ "$NODE_RANK" -ge "$NODE_CNT" ]; then # the job would wait for a node that is none of it
    echo "error: NODE_RANK $NODE_RANK of $NODE_CNT nodes: number them from 0 to $((NODE_CNT - 1))" >&2
    exit 2
fi

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
PYTHON=$ROOT/.venv/bin/python
[ -x "$PYTHON" ] || PYTHON=python3

LOAD=${LOAD:-checkpoints/meg/phase2_tp${TP}_pp${PP}}
SAVE=${SAVE:-checkpoints/meg/phase2_tp${TP}_pp${PP}_inst}
DATA_PATH=${DATA_PATH:-data/instruct.jsonl}
ITERS=${ITERS:-1600}
GLOBAL_BATCH_SIZE=${GLOBAL_BATCH_SIZE:-1024}
SEQ_LENGTH=${SEQ_LENGTH:-2048}
MAX_RESTARTS=${MAX_RESTARTS:-3}
EXTRA_ARGS=${EXTRA_ARGS:-}

gpus=$(nvidia-smi --list-gpus 2>/dev/null | wc -l || true)
DTYPE=
if [ "$gpus" -gt 0 ]; then
    GPUS_PER_NODE=${GPUS_PER_NODE:-$gpus}
    # Communication overlaps computation in the intended order only when kernels are queued in one.
    export CUDA_DEVICE_MAX_CONNECTIONS=1
    DTYPE=--bf16
else
    per_node=$((TP * PP / NODE_CNT))
    GPUS_PER_NODE=${GPUS_PER_NODE:-$((per_node > 0 ? per_node : 1))}
    # The processes share the cores: more threads than cores would only wait for each other.
    threads=$(($(getconf _NPROCESSORS_ONLN) / GPUS_PER_NODE))
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((threads > 0 ? threads : 1))}
fi

mkdir -p "$LOGDIR"
export PYTHONPATH=$ROOT/Megatron-LM:$ROOT${PYTHONPATH:+:$PYTHONPATH}
export PYTHONWARNINGS=${PYTHONWARNINGS:-ignore}

LOG=$LOGDIR/node_$NODE_RANK.log
# exec: a SIGTERM to this script must reach the launcher, and its exit code is the script's.
# shellcheck disable=SC2086 # EXTRA_ARGS is a list of words
exec "$PYTHON" -m megatron.crystalcoder.training.launch \
    --nproc-per-node "$GPUS_PER_NODE" --nnodes "$NODE_CNT" --node-rank "$NODE_RANK" \
    --master-addr "$MASTER" --master-port "$MASTER_PORT" --max-restarts "$MAX_RESTARTS" \
    "$ROOT/Megatron-LM/pretrain_crystalcoder_inst.py" \
    --tensor-model-parallel-size "$TP" --pipeline-model-parallel-size "$PP" --sequence-parallel \
    --micro-batch-size "$MBSZ" --global-batch-size "$GLOBAL_BATCH_SIZE" --seq-length "$SEQ_LENGTH" \
    --load "$LOAD" --save "$SAVE" --use-checkpoint-args --exit-on-missing-checkpoint --save-interval 100 \
    --data-path "$DATA_PATH" --dataloader-type cyclic --seed 42 \
    --train-iters "$ITERS" --lr-decay-iters "$ITERS" --lr 2e-4 --min-lr 2e-5 --lr-decay-style cosine \
    --lr-warmup-fraction 0.001 --weight-decay 0.1 --clip-grad 1.0 \
    --adam-beta1 0.9 --adam-beta2 0.95 --adam-eps 1e-8 \
    --overlap-grad-reduce $DTYPE \
    --log-interval 1 --tensorboard-dir "$LOGDIR/tensorboard" --tensorboard-queue-size 10 \
    $EXTRA_ARGS > >(tee -a "$LOG") 2> >(tee -a "$LOG" >&2)
