"""The commands for text-guided molecule generators and the captioned molecules that they are trained on."""
