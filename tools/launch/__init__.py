"""Launchers: one command that starts every process of a run."""
