"""Evaluation: how good samples are, and whether they are copies."""
