"""One module per command; each has `main(arguments)`, from parsed arguments to the functions of the packages."""
