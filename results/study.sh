#!/usr/bin/env bash
# DMC beside its variants, with equal steps from the same weights, at CR 2 and 4.
#
#     results/study.sh SEED...
#
# The model and its settings are those of `python train.py`.
# Runs go to runs/study/SEED (STUDY_RUNS names another place than runs/study). One that was
# interrupted goes on, and what is finished stays.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python}
runs=${STUDY_RUNS:-runs/study}
library=$("$python" -c 'import sysconfig; print(sysconfig.get_paths()["stdlib"])')

train() {       # train FOLDER FLAGS...
    local folder=$1
    shift
    if [ -f "$folder/summary.json" ]; then
        return
    elif [ -f "$folder/run.json" ]; then
        "$python" train.py --resume --out "$folder"
    else
        "$python" train.py --out "$folder" --data "$library/*.py" --preset laptop "$@"
    fi
}

for seed in "$@"; do
    # a plain model to start from; of its retrofit, no more than has to be
    train "$runs/$seed/start" --seed "$seed" --free-steps 1 --retrofit-steps 1 \
        --solidify-steps 1 --cr 2
    for cr in 4 2; do
        for variant in dmc dmc-c dmc-hardc local-prior immediate uniform fmp gqa; do
            # another seed than the start's, so that the text comes in another order
            control=$([ "$variant-$cr" = dmc-4 ] && echo --control || true)
            train "$runs/$seed/$variant-$cr" --init "$runs/$seed/start/pretrained" \
                --seed $((seed + 100)) --variant $variant --cr $cr --keep $cr $control
        done
    done
done
