"""Trackers: where a training reports to, beside its own folder."""
