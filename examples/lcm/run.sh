#!/usr/bin/env bash
# Distil Stable Diffusion 1.5 into a LoRA that generates images in 1 to 8 steps.
# Further flags can follow: bash run.sh --max_train_steps 3000 --train_batch_size 12
#
# Models come from huggingface.co. A mirror of it: export HF_ENDPOINT=https://hf-mirror.com
# The folder of a downloaded model works in place of its name. From ModelScope, for example:
#   modelscope download --model OWNER/NAME --local_dir my-model
#   MODEL_NAME=my-model bash run.sh
# On AI Studio, give the folder that a model or a data set is in, in the same way.

export MODEL_NAME=${MODEL_NAME:-stable-diffusion-v1-5/stable-diffusion-v1-5}
export DATASET_NAME=${DATASET_NAME:-../data/photos} # a folder with a metadata.jsonl, or a dataset of the hub
export OUTPUT_DIR=${OUTPUT_DIR:-lcm-lora-sd}

if [ -d "$DATASET_NAME" ]; then data=--train_data_dir; else data=--dataset_name; fi

exec python -u train_lcm_distill_lora_sd_wds.py \
  --pretrained_teacher_model "$MODEL_NAME" \
  "$data" "$DATASET_NAME" \
  --resolution 512 \
  --lora_rank 64 \
  --learning_rate 1e-4 \
  --max_train_steps 1000 \
  --train_batch_size 4 \
  --gradient_checkpointing \
  --mixed_precision fp16 \
  --validation_prompt "sushi rolls in the form of panda heads, sushi platter" \
  --output_dir "$OUTPUT_DIR" \
  "$@"
