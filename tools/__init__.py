"""What a person runs around training: the benchmark, the bars, the report."""
