#!/usr/bin/env bash
# A pretrained model retrofitted with few tokens: DMC at CR 2, 3 and 4, and the control.
#
#     results/retrofit.sh cpu MODEL TEXT...    SmolLM2-135M on a CPU: 0.6 M tokens to CR 4
#     results/retrofit.sh gpu MODEL TEXT...    the same recipe on one H100: 184 M tokens to CR 4
#     results/retrofit.sh 7b MODEL TEXT...     Llama 2 7B, 184 M tokens to CR 4, on two H100
#
# MODEL and TEXT are what --init and --data of train.py take. The run is runs/retrofit-cpu and so
# on; one that was interrupted goes on. TRY=1 takes a few small steps of each phase, in
# runs/try-cpu, to see that all is in place. PYTHON names another python.
set -euo pipefail
cd "$(dirname "$0")/.."
if [ $# -lt 3 ]; then
    echo "retrofit.sh: give a size (cpu, gpu or 7b), the model, and one or more texts." >&2
    exit 2
fi
size=$1 model=$2
shift 2
python=${PYTHON:-python} folder=runs/retrofit-$size
case $size in
cpu) flags=() ;;
gpu) flags=(--context 2048 --batch 32 --micro-batch 16 --free-steps 60 --retrofit-steps 2250
            --solidify-steps 500 --save-every 250 --log-every 50) ;;
7b)  flags=(--context 4096 --batch 64 --micro-batch 1 --lr 3e-5 --free-steps 15
            --retrofit-steps 560 --solidify-steps 125) ;;
*)   echo "retrofit.sh: $size is no size; give cpu, gpu or 7b." >&2; exit 2 ;;
esac
command=("$python")
if [ "$size" = 7b ]; then command=(torchrun --nproc_per_node 2); fi
if [ "${TRY:-0}" = 1 ]; then
    folder=runs/try-$size command=("$python")
    flags+=(--context 64 --batch 4 --micro-batch 2 --free-steps 2 --retrofit-steps 3
            --solidify-steps 2 --eval-sequences 2)
fi
if [ -f "$folder/run.json" ]; then
    exec "${command[@]}" train.py --resume --out "$folder"
fi
exec "${command[@]}" train.py --out "$folder" --init "$model" --data "$@" --preset few-tokens \
    --solidify 4 2 3 --control "${flags[@]}"
