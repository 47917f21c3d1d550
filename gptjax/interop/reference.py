"""Logits of a folder as transformers computes them: python -m gptjax.interop.reference FOLDER TOKENS.npy LOGITS.npy"""

import os
import sys

import numpy as np

from gptjax.interop.comparison import COMPARED


def main(folder: str, tokens: str, out: str) -> None:
  os.environ |= {'HF_HUB_OFFLINE': '1', 'TRANSFORMERS_VERBOSITY': 'error'}
  import torch
  import transformers
  # Only eager attention supports every family's options, such as capped scores.
  model = transformers.AutoModelForCausalLM.from_pretrained(
    folder, dtype=torch.float32, use_safetensors=True, local_files_only=True, trust_remote_code=False, attn_implementation='eager').eval()
  with torch.no_grad():
    ids, positions = torch.from_numpy(np.load(tokens)).long()
    mask = torch.ones_like(ids[None])  # without it, gaps between positions would separate packed documents
    logits = model(ids[None], attention_mask=mask, position_ids=positions[None], use_cache=False, logits_to_keep=COMPARED).logits[0]
  np.save(out, logits.numpy())


if __name__ == '__main__':
  main(*sys.argv[1:])
