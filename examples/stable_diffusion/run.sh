#!/usr/bin/env bash
# Train a LoRA of Stable Diffusion 1.5.
# Further flags can follow: bash run.sh --max_train_steps 3000 --rank 8
#
# Models come from huggingface.co. A mirror of it: export HF_ENDPOINT=https://hf-mirror.com
# The folder of a downloaded model works in place of its name. From ModelScope, for example:
#   modelscope download --model OWNER/NAME --local_dir my-model
#   MODEL_NAME=my-model bash run.sh
# On AI Studio, give the folder that a model or a data set is in, in the same way.

export MODEL_NAME=${MODEL_NAME:-stable-diffusion-v1-5/stable-diffusion-v1-5}
export DATASET_NAME=${DATASET_NAME:-../data/photos} # a folder with a metadata.jsonl, or a dataset of the hub
export OUTPUT_DIR=${OUTPUT_DIR:-sd-lora}

if [ -d "$DATASET_NAME" ]; then data=--train_data_dir; else data=--dataset_name; fi

exec python -u train_text_to_image_lora.py \
  --pretrained_model_name_or_path "$MODEL_NAME" \
  "$data" "$DATASET_NAME" \
  --resolution 512 \
  --train_batch_size 1 \
  --encoded_cache \
  --gradient_checkpointing \
  --mixed_precision bf16 \
  --max_train_steps 1000 \
  --validation_prompt "a tabby cat in a spacesuit" \
  --validation_steps 250 \
  --output_dir "$OUTPUT_DIR" \
  "$@"
