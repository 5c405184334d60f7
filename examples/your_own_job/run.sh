#!/usr/bin/env bash
# Train the decoder of the VAE of Stable Diffusion 1.5, the example of a job of your own.
# Further flags can follow: bash run.sh --max_train_steps 3000 --resolution 256
#
# Models come from huggingface.co. A mirror of it: export HF_ENDPOINT=https://hf-mirror.com
# The folder of a downloaded model works in place of its name. From ModelScope, for example:
#   modelscope download --model OWNER/NAME --local_dir my-model
#   MODEL_NAME=my-model bash run.sh
# On AI Studio, give the folder that a model or a data set is in, in the same way.

export MODEL_NAME=${MODEL_NAME:-stable-diffusion-v1-5/stable-diffusion-v1-5}
export DATASET_NAME=${DATASET_NAME:-../data/photos} # a folder with a metadata.jsonl, or a dataset of the hub
export OUTPUT_DIR=${OUTPUT_DIR:-vae-decoder}

if [ -d "$DATASET_NAME" ]; then data=--train_data_dir; else data=--dataset_name; fi

exec python -u train_vae_decoder.py \
  --pretrained_model_name_or_path "$MODEL_NAME" \
  "$data" "$DATASET_NAME" \
  --random_flip \
  --train_batch_size 1 \
  --gradient_accumulation_steps 4 \
  --gradient_checkpointing \
  --learning_rate 1e-5 \
  --validation_prompt "a close-up photo of a tabby cat" \
  --validation_steps 1000 \
  --max_train_steps 15000 \
  --output_dir "$OUTPUT_DIR" \
  "$@"
