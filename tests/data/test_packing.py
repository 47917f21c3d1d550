"""Best-fit packing with a context longer than all documents."""

import numpy as np

from gptjax.data.packing import best_fit


def test_a_context_far_longer_than_all_documents_needs_no_extra_memory():
  assert best_fit(np.array([3, 5, 4]), 2**31 - 1) == best_fit(np.array([3, 5, 4]), 12) == [[1, 2, 0]]
