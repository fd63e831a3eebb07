"""What sifters share: features of a trained model, the model itself, and where the line is drawn."""
