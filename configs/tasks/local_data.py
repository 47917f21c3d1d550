"""Loads the data of the tasks in this folder from `task_data`, the folder that gptjax.evaluate --task_data or lm_eval --metadata names."""

import json
from pathlib import Path

from datasets import Dataset


def lambada(task_data: str = '', **_) -> dict[str, Dataset]:
  """The passages of lambada/lambada_test.jsonl."""
  return {'test': Dataset.from_list(_records(Path(task_data, 'lambada/lambada_test.jsonl')))}


def piqa(task_data: str = '', **_) -> dict[str, Dataset]:
  """The questions of piqa/valid.jsonl, with their labels from piqa/valid-labels.lst."""
  questions = _records(Path(task_data, 'piqa/valid.jsonl'))
  labels = Path(task_data, 'piqa/valid-labels.lst').read_text(encoding='utf-8-sig').split()
  if len(labels) != len(questions):
    raise ValueError(f'{len(questions)} questions in piqa/valid.jsonl, {len(labels)} labels in piqa/valid-labels.lst')
  return {'validation': Dataset.from_list([question | {'label': int(label)} for question, label in zip(questions, labels)])}


def _records(path: Path) -> list[dict]:
  return [json.loads(line) for line in path.read_text(encoding='utf-8-sig').split('\n') if line.strip()]
