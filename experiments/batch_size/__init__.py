"""The batch size above which equal tokens lose, and what the gradient noise scale says about it: README.md."""
