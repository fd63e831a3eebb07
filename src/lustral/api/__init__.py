"""What the command line and Python callers share: models and data in any form, results and their folders. Imports no torch."""
