"""Bars: what the project promises, measured at full size; python -m tests.acceptance runs them."""
