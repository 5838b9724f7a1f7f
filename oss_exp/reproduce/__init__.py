"""The paper's tables and figures by one command: plan the runs, make those that are missing, set ours beside theirs.

A `Cell` is one run of the program, kept in a folder named by what it computes (cells.py). A table's plan (plans.py)
says which cell holds the number that stands for each of the paper's (paper.py); render.py writes both, and whether the
paper's claims hold here.
"""
