"""Data that needs no download, and readers for the user's own."""
