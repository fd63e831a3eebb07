"""Image classifiers: sets, models, attacks, defences, and what they are measured by."""
