"""The command line: a module for each sub-command of `equilibrium-mcore`, and what they share."""
