"""Optimizers: one file for each rule, and the registry of `--optimizer`."""
