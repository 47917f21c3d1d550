"""Logits of a folder as transformers computes them: python -m gptjax.interop.reference FOLDER '[ids]' LOGITS.npy"""

import json
import os
import sys

import numpy as np


def main(folder: str, tokens: str, out: str) -> None:
  os.environ |= {'HF_HUB_OFFLINE': '1', 'TRANSFORMERS_VERBOSITY': 'error'}
  import torch
  import transformers
  # Only eager attention supports every family's options, such as capped scores.
  model = transformers.AutoModelForCausalLM.from_pretrained(
    folder, dtype=torch.float32, use_safetensors=True, local_files_only=True, trust_remote_code=False, attn_implementation='eager').eval()
  with torch.no_grad():
    logits = model(torch.tensor([json.loads(tokens)])).logits[0]
  np.save(out, logits.numpy())


if __name__ == '__main__':
  main(*sys.argv[1:])
