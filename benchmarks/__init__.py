"""One script per claim about speed; see docs/performance.md, which `python -m benchmarks.report` writes."""
