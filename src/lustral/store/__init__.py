"""Records and files of results, named by content. Imports no torch."""
