"""What a person runs around training: the benchmark, the bars, the report."""

import gptjax  # noqa: F401  (first: it handles signals)
