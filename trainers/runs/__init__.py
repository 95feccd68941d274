"""What a run is made of: its folder, checkpoints, facts, stages and recipe."""
