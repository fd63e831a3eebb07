"""Sifters find the suspicious images of a training set of unknown origin: one file per published method."""
