"""Tools around training: data preparation, inspection, conversion, launchers, reports, the benchmark."""

import gptjax  # noqa: F401  (first: it handles signals)
