"""Run the command line as `python -m oss_exp`."""

from oss_exp.cli import main

main()
