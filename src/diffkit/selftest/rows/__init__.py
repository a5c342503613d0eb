"""The rows of the scorecard, by subject."""
