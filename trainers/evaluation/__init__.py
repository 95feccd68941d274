"""Metrics, probes and comparisons of a student with its teacher."""
