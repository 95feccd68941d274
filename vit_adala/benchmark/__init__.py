"""What `vit-adala bench` and the scripts in benchmarks/ measure with: time, memory, and the floor of the machine."""
