#!/usr/bin/env bash
# Train a LoRA of Kandinsky 2.2's decoder.
# Further flags can follow: bash run.sh --max_train_steps 3000 --lora_rank 8
#
# Models come from huggingface.co. A mirror of it: export HF_ENDPOINT=https://hf-mirror.com
# The folder of a downloaded model works in place of its name. From ModelScope, for example:
#   modelscope download --model OWNER/NAME --local_dir my-model
#   MODEL_NAME=my-model bash run.sh
# On AI Studio, give the folder that a model or a data set is in, in the same way.

export MODEL_NAME=${MODEL_NAME:-kandinsky-community/kandinsky-2-2-decoder}
export PRIOR_NAME=${PRIOR_NAME:-kandinsky-community/kandinsky-2-2-prior}
export DATASET_NAME=${DATASET_NAME:-../data/photos} # a folder with a metadata.jsonl, or a dataset of the hub
export OUTPUT_DIR=${OUTPUT_DIR:-kandi2-decoder-lora}

if [ -d "$DATASET_NAME" ]; then data=--train_data_dir; else data=--dataset_name; fi

exec python -u train_text_to_image_decoder_lora.py \
  --pretrained_decoder_model_name_or_path "$MODEL_NAME" \
  --pretrained_prior_model_name_or_path "$PRIOR_NAME" \
  "$data" "$DATASET_NAME" \
  --resolution 768 \
  --train_batch_size 1 \
  --gradient_accumulation_steps 4 \
  --max_train_steps 15000 \
  --learning_rate 1e-4 \
  --lr_scheduler constant --lr_warmup_steps 0 \
  --seed 42 \
  --lora_rank 4 \
  --validation_prompt "cute dragon creature" \
  --validation_steps 1000 \
  --output_dir "$OUTPUT_DIR" \
  "$@"
