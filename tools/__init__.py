"""Tools around training: data preparation, inspection, conversion, launchers, reports, the benchmark."""

import gptjax.program  # noqa: F401  (first: it handles signals)
