"""What purifiers share: the run, the choice of weights, masks, perturbations, statistics."""
