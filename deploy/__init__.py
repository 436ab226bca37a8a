"""The front door: the command line, recipes and the pipeline. May know all other packages."""
