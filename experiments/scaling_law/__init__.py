"""How the loss of a model falls with its size and its data: README.md."""
