"""Safe trainers learn from a training set of unknown origin without its backdoor: one file per published method."""
