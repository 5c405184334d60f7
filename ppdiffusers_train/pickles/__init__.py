"""Pickled weights, as Paddle and torch write them, read without running anything that a file says.

Python's own reader calls whatever functions a pickle names. Here, `machine.py` interprets the few opcodes that data
need, `builders.py` knows what the names in files of weights stand for, and makes arrays of them itself; any other name
is an error. `files.py` knows the layouts of the files.
"""
