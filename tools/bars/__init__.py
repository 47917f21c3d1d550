"""Bars: what the project promises, measured at full size; python -m tools.bars runs them."""
