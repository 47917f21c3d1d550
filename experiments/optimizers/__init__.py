"""AdamW, Muon and Lion, each at its own rate, on the same data and budget: README.md."""
