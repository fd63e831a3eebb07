"""What knows no modality: records, costs, rates, randomness, settings, files."""
