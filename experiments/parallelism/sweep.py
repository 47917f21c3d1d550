"""The layouts that are compared: one small model on eight devices, divided in each way that gptjax has.

`measure.py` compiles them. As any sweep they can be trained too, with --train_flags=--cpu_devices=8.
"""

from pathlib import Path

from gptjax.config import Config
from gptjax.sweeps import Sweep, make_trials
from gptjax.sweeps.points import Point

MODEL: Point = {
  'model.layers': 8, 'model.width': 128, 'model.heads': 8, 'model.mlp_width': 352, 'model.vocab_size': 259, 'model.vocab_multiple': 8,
  'compute.scan': True,  # one program for all layers, which is compiled sooner
  'compute.attention': 'blocks',  # the plan counts what a kernel of the accelerator keeps, the compiler what this one does
  'data.isolate_documents': False, 'batch_size': 64, 'microbatches': 8, 'steps': 20, 'optimizer.warmup': 2}


def layouts(part: int, rows: int, expert_width: int) -> dict[str, Point]:
  """Points by name, for part * rows devices: `part` of them divide what the layout is about, `rows` of those groups the batch."""
  tensor, pipe = ({f'mesh.{axis}': part, 'mesh.data': rows} for axis in ('model', 'pipe'))
  ring, expert = ({f'mesh.{axis}': part, 'mesh.data': rows} for axis in ('context', 'expert'))
  data = {'mesh.data': part * rows}
  experts = expert | {'model.experts': 2 * part, 'model.expert_width': expert_width}
  return {
    **{f'ZeRO {stage}': data | {'zero_stage': stage} for stage in range(4)},
    'ZeRO 3 in replicas': {'mesh.replica': rows, 'mesh.data': part, 'zero_stage': 3},
    'model': tensor, 'model, sequence': tensor | {'compute.sequence_parallel': True},
    'model and ZeRO 3': tensor | {'zero_stage': 3},
    'GPipe': pipe | {'pipeline.schedule': 'GPipe'}, '1F1B': pipe | {'pipeline.schedule': '1F1B'},
    'Interleaved1F1B': pipe | {'pipeline.schedule': 'Interleaved1F1B', 'pipeline.chunks': 2},
    'ZBH1': pipe | {'pipeline.schedule': 'ZBH1'},
    'context, ring': ring, 'context, gathered': ring | {'compute.context_attention': 'all_gather'},
    'experts, exchanged': experts | {'model.experts_per_token': part // 2},
    'experts, gathered': experts | {'model.experts_per_token': part}}


LAYOUTS = layouts(4, 2, expert_width=176)


def get_sweep() -> Sweep:
  return Sweep('configs/experiment.py', list(LAYOUTS.values()), overrides=MODEL)


def resolved(sweep: Sweep, layouts: dict[str, Point]) -> dict[str, Config]:
  """The checked config of each layout."""
  trials = make_trials(sweep, layouts.values(), Path(__file__))
  return {name: trial.config for name, trial in zip(layouts, trials, strict=True)}
