"""Questions that need many runs, each with its method, its commands and its answer: experiments/README.md."""
