"""How far can one trust a plan? By kind of parallelism: memory, traffic and idle time as planned, beside those of the compiled program."""
