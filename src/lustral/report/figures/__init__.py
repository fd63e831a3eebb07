"""What pages and terminals draw: curves, bars, histograms, clouds of points, small pictures."""
