"""``lustral report``: a page from a saved result."""
