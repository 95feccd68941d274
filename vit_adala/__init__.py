"""The command line `vit-adala`. Nothing heavy is imported before the arguments are known to be right."""
