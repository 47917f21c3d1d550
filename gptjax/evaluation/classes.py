"""Figures of a classifier of texts: accuracy, F1 of each class and confusion matrix, beside those of the majority class and naive Bayes."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from gptjax.data import NaiveBayes, TokenStore, Tokenizer, classified_texts
from gptjax.files import save_figure
from gptjax.model import Head

Confusion = tuple[tuple[int, ...], ...]
"""[C][C], number of texts by their class and the predicted one."""
Figures = dict[str, Any]
"""texts, accuracy, macro_f1, f1 and confusion: see `class_figures`."""
_MAX_CLASSES = 12  # of a matrix on the terminal


def confusion_sums(head: Head, hidden: Float[Array, 'N D'], batch: Mapping[str, Array]) -> Float[Array, 'C C']:
  """The confusion matrix of some rows: each target counts once, by its class and the most probable one."""
  targets, mask = (batch[name].reshape(-1) for name in ('targets', 'mask'))
  predicted = head.logits(hidden).argmax(-1)
  return jnp.zeros((head.vocab_size, head.vocab_size)).at[targets, predicted].add(mask, mode='drop')  # other tokens have other targets


def counted(matrix: np.ndarray) -> Confusion:
  """A matrix as a Confusion."""
  return tuple(tuple(map(int, row)) for row in matrix)


def class_figures(confusion: Confusion | np.ndarray, labels: Sequence[Any]) -> Figures:
  """Number of texts, accuracy, f1 of each class, 0 for one that no text has or gets, macro_f1, their mean, and the confusion matrix."""
  matrix = np.array(confusion)
  either = matrix.sum(0) + matrix.sum(1)
  f1 = 2 * matrix.diagonal() / np.maximum(either, 1)
  return {'texts': int(matrix.sum()), 'accuracy': float(matrix.trace() / matrix.sum()), 'macro_f1': float(f1.mean()),
          'f1': dict(zip(labels, f1.tolist(), strict=True)), 'confusion': matrix.tolist()}


def class_baselines(bayes: NaiveBayes, stores: Mapping[str, TokenStore], groups: Mapping[str, Sequence[str]], tokenizer: Tokenizer,
                    longest: int) -> dict[str, dict[str, Figures]]:
  """The figures of the majority class and of naive Bayes on the texts of groups of sets; `longest` as in `classified_texts`."""
  found: dict[str, dict[str, np.ndarray]] = {'majority class': {}, 'naive Bayes': {}}
  for name, store in stores.items():
    texts = list(classified_texts(store, tokenizer, longest))
    labels, predicted = np.array([label for _, label in texts], int), bayes.predict(text for text, _ in texts)
    for baseline, classes in (('majority class', np.full_like(predicted, bayes.majority)), ('naive Bayes', predicted)):
      found[baseline][name] = np.zeros((len(store.labels),) * 2, int)
      np.add.at(found[baseline][name], (labels, classes), 1)
  names = next(iter(stores.values())).labels
  return {baseline: {group: class_figures(np.sum([matrices[name] for name in members], 0), names) for group, members in groups.items()}
          for baseline, matrices in found.items()}


def class_table(step: int, figures: Mapping[str, Figures], beside: Mapping[str, Mapping[str, Figures]]) -> str:
  """A table for the terminal of the figures of each set, with those of each baseline `beside` them, and the confusion matrices."""
  lines = [f'{"step":>9}  {"set":<22}{"figure":<22}{"model":>10}' + ''.join(f'{name:>16}' for name in beside)]
  for name, ours in figures.items():
    rows = [{'accuracy': one['accuracy'], 'macro F1': one['macro_f1'], **{f'F1 {label}': value for label, value in one['f1'].items()}}
            for one in (ours, *(of[name] for of in beside.values()))]
    lines += [f'{step:>9}  {name:<22}{title:<22}{value:>10.4f}' + ''.join(f'{row[title]:>16.4f}' for row in rows[1:])
              for title, value in rows[0].items()]
  for name, ours in figures.items():
    lines.append(f'{name}: {ours["texts"]:,} texts, loss {ours["loss"]:.4f} nats per text')
    if len(ours['f1']) <= _MAX_CLASSES:
      lines[-1] += ', by their class (rows) and the predicted one'
      width = max(7, *map(len, ours['f1'])) + 2
      lines.append(' ' * width + ''.join(f'{label:>{width}}' for label in ours['f1']))
      lines += [f'{label:>{width}}' + ''.join(f'{count:>{width},}' for count in row) for label, row in zip(ours['f1'], ours['confusion'])]
  return '\n'.join(lines)


def draw_confusion(figures: Mapping[str, Figures], path: Path) -> None:
  """Writes a PNG with the confusion matrix of each set, coloured by the fraction of a class's texts."""
  from matplotlib import rc_context
  from matplotlib.figure import Figure

  with rc_context({'text.parse_math': False}):  # names are no formulas
    figure = Figure(figsize=(4.2 * len(figures), 3.8), layout='constrained')
    for axis, (name, one) in zip(figure.subplots(1, len(figures), squeeze=False)[0], figures.items()):
      matrix, places = np.array(one['confusion']), range(len(one['f1']))
      shares = matrix / np.maximum(matrix.sum(1, keepdims=True), 1)
      axis.imshow(shares, cmap='Blues', vmin=0, vmax=1)
      for row, column in np.ndindex(matrix.shape) if len(places) <= _MAX_CLASSES else ():
        colour = 'white' if shares[row, column] > 0.5 else 'black'
        axis.text(column, row, f'{matrix[row, column]:,}', ha='center', va='center', color=colour)
      axis.set(title=f'{name}: accuracy {one["accuracy"]:.2%}', xlabel='predicted class', ylabel='class')
      axis.set_xticks(places, one['f1'], rotation=45, ha='right')
      axis.set_yticks(places, one['f1'])
    save_figure(figure, path, dpi=130)
