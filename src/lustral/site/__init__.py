"""A static site made of a store: a leaderboard, and a page for each method and result. Imports no torch."""
