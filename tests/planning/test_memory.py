"""What a device keeps of a row for the backward pass, by the recomputing that the config asks for."""

import dataclasses

from gptjax.planning.memory import row_bytes


def test_activations_grow_with_layers_and_shrink_by_recomputing(style):
  size = lambda model=1, **changes: row_bytes(dataclasses.replace(style, **changes), 24, model)
  none, stacked = size(), size(scan=True)
  assert none > 0 and 0.9 < stacked / none < 1.1
  assert size(compute_dtype='bfloat16') < 0.8 * none
  for scan in (False, True):
    full, dots = size(remat='full', scan=scan), size(remat='dots', scan=scan)
    assert full < dots < (stacked if scan else none)
    assert full < size(remat='names', saved=('q', 'up'), scan=scan) < dots
    assert size(remat='names', scan=scan) == full
    # With whole blocks recomputed a layer leaves its input and nothing else.
    one, three = (size(remat='full', scan=scan, layers=layers) for layers in (1, 3))
    assert three - one == 2 * 24 * style.width * 4


def test_devices_share_a_row_and_with_it_split_by_token_all_of_it(style):
  size = lambda model, **changes: row_bytes(dataclasses.replace(style, layers=8, scan=True, **changes), 24, model)
  assert size(2) < size(1) and size(2, sequence_parallel=True) < size(2)
  layers = lambda model: row_bytes(dataclasses.replace(style, layers=8, scan=True, remat='full', sequence_parallel=True), 24, model)
  one_less = lambda model: row_bytes(dataclasses.replace(style, layers=7, scan=True, remat='full', sequence_parallel=True), 24, model)
  assert 2 * (layers(2) - one_less(2)) == layers(1) - one_less(1) == 24 * style.width * 4
