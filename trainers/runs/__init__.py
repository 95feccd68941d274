"""Parts of a run: its folder, checkpoints, facts, stages and recipe."""
