"""The networks that are built by name."""
