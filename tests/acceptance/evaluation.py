"""Bars of evaluation: the harness's torch backend and ours on the same model, and every mesh alike."""

import json
from pathlib import Path

from tests.acceptance.record import Result, bar, evaluate, given, python, train
from tests.acceptance.training import shakespeare


def samples(path: Path) -> list[dict]:
  """Requests of tasks and the responses to them."""
  return [json.loads(line) for line in path.read_text().splitlines()]


def farthest(ours: list[dict], theirs: list[dict]) -> tuple[float, int, int]:
  """The largest difference of two log-likelihoods, how many requests were answered, and how many differ in whether the answer is the
  likeliest; both must have been asked the same."""
  assert [(one['task'], one['doc_id'], one['arguments']) for one in ours] == [
    (one['task'], one['doc_id'], one['arguments']) for one in theirs]
  answers = lambda some: [answer[0] for one in some for answer in one['resps']]
  pairs = list(zip(answers(ours), answers(theirs), strict=True))
  return max(abs(a - b) for (a, _), (b, _) in pairs), len(pairs), sum(a != b for (_, a), (_, b) in pairs)


@bar
def harness(folder: Path) -> Result:
  data = given('lambada/lambada_test.jsonl').parents[1]
  # Of a family that can be exported; larger would take longer and prove no more.
  train('default', folder / 'run', f'--config.data.source.path={given("books/train")}', f'--config.data.tokenizer.path={given("gpt2_bpe")}',
        '--config.data.valid_fraction=0.01', '--config.model.width=128', '--config.model.heads=4', '--config.model.mlp_width=384',
        '--config.model.qk_norm=none', '--config.steps=300', '--config.eval.rows=16', '--config.eval.sample_tokens=0')
  python('tools.export_hf', f'--workdir={folder}/run', f'--folder={folder}/hf')
  put = ('--tasks=lambada,piqa', f'--task_data={data}')
  ours = evaluate(folder / 'run', *put, '--sets=none', '--batch_size=32', f'--samples={folder}/ours.jsonl')['tasks']
  theirs = json.loads(python('tests.acceptance.torch_backend', f'--folder={folder}/hf', *put, f'--samples={folder}/theirs.jsonl').stdout)
  off, count, other = farthest(samples(folder / 'ours.jsonl'), samples(folder / 'theirs.jsonl'))
  accuracies = {(task, name): (ours[task][name], theirs[task][name]) for task, name in (
    ('lambada', 'acc'), ('piqa', 'acc'), ('piqa', 'acc_norm'))}
  return Result("a small model trained on books and exported, through the harness's torch backend and through ours, LAMBADA and PIQA in "
                'full: the same accuracies, log-likelihoods within 1e-3 (its log-softmax in float64: in float32 it is off by 2.3e-3 nats)',
                f'{count:,} log-likelihoods, largest difference {off:.1e}, {other} others greedy; '
                + ', '.join(f'{task} {name} {a:.4f} and {b:.4f}' for (task, name), (a, b) in accuracies.items())
                + f'; lambada perplexity {ours["lambada"]["perplexity"]:,.1f} and {theirs["lambada"]["perplexity"]:,.1f}',
                count == 5153 + 2 * 1838 and off <= 1e-3 and not other and all(a == b for a, b in accuracies.values()),
                'python -m gptjax.evaluate --workdir=RUN --tasks=lambada,piqa --task_data=FOLDER')


@bar
def evaluation_meshes(folder: Path) -> Result:
  run = folder / 'run'
  train('shakespeare_char_cpu', run, shakespeare(), '--stop_at=20', '--config.data.tokenizer.kind=bytes', '--config.batch_size=16',
        '--cpu_devices=8', '--config.mesh.data=4', '--config.mesh.model=2', '--config.zero_stage=3')
  data = given('lambada/lambada_test.jsonl').parents[1]
  scores, answers = {}, {}
  for devices, model in ((1, 1), (8, 1), (8, 2), (8, 4)):
    name = f'{devices // model} x {model}'
    scores[name] = evaluate(run, f'--cpu_devices={devices}', f'--model_axis={model}', '--tasks=lambada', f'--task_data={data}',
                            '--limit=200', f'--samples={folder}/{model}-{devices}.jsonl')
    answers[name] = samples(folder / f'{model}-{devices}.jsonl')
  one, asked = scores.pop('1 x 1'), answers.pop('1 x 1')
  loss = max(abs(found[name] / one[name] - 1) for found in scores.values() for name in ('loss', 'perplexity', 'bits_per_byte'))
  total = lambda some: [answer[0][0] for one in some for answer in one['resps']]
  nats = max(abs(a / b - 1) for found in answers.values() for a, b in zip(total(found), total(asked), strict=True))
  alike = all(found['tasks']['lambada']['acc'] == one['tasks']['lambada']['acc'] and found['tokens'] == one['tokens']
              for found in scores.values())
  return Result('trained at ZeRO stage 3 on data 4 x model 2, evaluated on 1 device and on 8 with model 1, 2 and 4: loss, perplexity, bits '
                'per byte and log-likelihoods of a task within 1e-5 relative',
                f'scores {loss:.1e}, {len(asked)} log-likelihoods {nats:.1e}', loss <= 1e-5 and nats <= 1e-5 and alike and len(scores) == 3,
                'python -m gptjax.evaluate --workdir=RUN --cpu_devices=8 --model_axis=4')
