#!/usr/bin/env bash
# Tokenise the four languages of phase 3, each with its configuration and the reference's flags; further flags are passed on.
#   data_prep/scripts/stage3_tokenization_script.sh [--reference-compat] [--overwrite] …
# It reads data/starcoderdata_jsonl_split/train/<language>, which this makes of StarCoderData's JSON lines:
#   crystalcoder data partition data/starcoderdata_jsonl --out data/starcoderdata_jsonl_split --valid 0.005
set -euo pipefail
here=$(cd "$(dirname "$0")/.." && pwd)
for language in python html css javascript; do
    "${PYTHON:-python}" "$here/create_hdf5_dataset.py" LMData --params "$here/configs/tokenizer_config_$language.yaml" \
        --seed 45 --processes "${PROCESSES:-4}" --split_text_to_tokenize True --ignore_bos_in_split_text True \
        --encoder_file ./tokenizer.json --input_dir "data/starcoderdata_jsonl_split/train/$language" \
        --output_dir "data/starcoderdata_tokenized_stage3_split/train/$language" "$@"
done
