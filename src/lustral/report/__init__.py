"""Evidence to show: one self-contained HTML page per scan or erasure (``page.py``); the words and charts of all pages."""
