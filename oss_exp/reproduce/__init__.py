"""Reproduction of the paper's tables and figures by one command.

A `Cell` is one run of the program, in a folder named by what it computes (cells.py).
The plan of a table (plans.py) names the cell of each number that stands for one of the
paper's (paper.py). render.py writes both numbers, and whether the paper's claims hold
here.
"""
