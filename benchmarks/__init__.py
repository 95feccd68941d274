"""One script per measurement of speed; `python -m benchmarks.tables` puts their results into docs/speed.md."""
