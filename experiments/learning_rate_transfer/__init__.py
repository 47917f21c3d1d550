"""Which peak learning rate is best at each width: for AdamW in standard parametrization, AdamW with muP, and Muon."""
