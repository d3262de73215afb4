#!/usr/bin/env bash
# Shuffle sequences across files, domains and epochs into one order: the step for which the reference's script is empty.
#   data_prep/scripts/shuffle.sh OUT FILES SEED IN…
# Phase 2 (both epochs of StarCoder after FIM, and the second half of SlimPajama):
#   data_prep/scripts/shuffle.sh data/phase2_train_packed 1024 0 data/StarCoder_fim data/slimpajama_train_packed_part1of2
# Phase 3 (the four languages in their three epochs):
#   data_prep/scripts/shuffle.sh data/phase3_train_packed 256 0 data/starcoderdata_tokenized_stage3_split_fim_0.3/train
set -euo pipefail
if (($# < 4)); then
    sed -n '2,7s/^# \{0,1\}//p' "$0" >&2
    exit 2
fi
out=$1 files=$2 seed=$3
shift 3
exec crystalcoder data shuffle "$@" --out "$out" --files "$files" --seed "$seed" --processes "${PROCESSES:-1}"
