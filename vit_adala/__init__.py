"""The command line `vit-adala`. Nothing heavy is imported before the command is known."""
