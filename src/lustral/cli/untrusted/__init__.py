"""The commands for a training set of unknown origin: their flags, how the set is opened, and what they write."""
