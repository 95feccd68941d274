"""The report of a recipe: tables, plots and pictures."""
