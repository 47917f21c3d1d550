"""DPO on a JSON list of records with instruction, input, chosen and rejected, from the model of configs/instructions.py, on 2 cores.

The start and the reference is runs/instructions. Set the data: --config.data.source.path=FILE.json.
Expected: in 86 % of held-out pairs the chosen answer has the higher reward.
"""

from gptjax.config import CheckpointConfig, Config, DataConfig, EvalConfig, ObjectiveConfig, OptimizerConfig, SourceConfig


def get_config() -> Config:
  return Config(
    objective=ObjectiveConfig('preference', beta=0.1),
    init_from='runs/instructions',
    data=DataConfig(
      source=SourceConfig(
        prompt='{instruction}\\n{input}', chosen='chosen', rejected='rejected', chat='plain',
        skip=0.05),  # some pairs have equal answers
      valid_fraction=0.0555,
      context=256, rows='pack'),  # two pairs per row
    optimizer=OptimizerConfig(
      peak_lr=1e-4,  # a thirtieth of the rate of instructions.py: the model should stay near its reference
      schedule='linear', final_fraction=0.0, warmup=20, weight_decay=0.0),
    steps='2 epochs',
    batch_size=8,
    eval=EvalConfig(every='1 epoch', prompt='Rewrite the sentence in the past tense.\\nShe walks home.', sample_tokens=40),
    checkpoint=CheckpointConfig(every=0))
