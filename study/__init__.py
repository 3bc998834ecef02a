"""Comparisons of ways to route: the same questions, several seeds, one table."""
