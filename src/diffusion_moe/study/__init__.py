"""Paired experiments: variants of one recipe on the same seeds, their records, and a page of verdicts."""
