"""Measurements of `vit-adala bench` and the scripts in benchmarks/: time, memory, and the floor of the machine."""
