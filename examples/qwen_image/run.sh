#!/usr/bin/env bash
# Train a LoRA of Qwen-Image.
# Further flags can follow: bash run.sh --max_train_steps 3000 --quantize_base nf4
#
# Models come from huggingface.co. A mirror of it: export HF_ENDPOINT=https://hf-mirror.com
# The folder of a downloaded model works in place of its name. From ModelScope, for example:
#   modelscope download --model OWNER/NAME --local_dir my-model
#   MODEL_NAME=my-model bash run.sh
# On AI Studio, give the folder that a model or a data set is in, in the same way.

export MODEL_NAME=${MODEL_NAME:-Qwen/Qwen-Image}
export DATASET_NAME=${DATASET_NAME:-../data/photos} # a folder with a metadata.jsonl, or a dataset of the hub
export OUTPUT_DIR=${OUTPUT_DIR:-qwen-image-lora}

if [ -d "$DATASET_NAME" ]; then data=--train_data_dir; else data=--dataset_name; fi

exec python -u train_qwen_image_lora.py \
  --pretrained_model_name_or_path "$MODEL_NAME" \
  "$data" "$DATASET_NAME" \
  --validation_prompt "a tabby cat in a spacesuit" \
  --validation_epochs 10 \
  --output_dir "$OUTPUT_DIR" \
  "$@"
