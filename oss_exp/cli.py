"""The command line: help, misspelled overrides, and the errors of the jobs that it starts.

An error that the user's input causes ends in one message and exit code 1, and with
HYDRA_FULL_ERROR=1 in the full traceback. PyTorch and Lightning take seconds to load, so that this
module loads them only for what needs them.
"""

from __future__ import annotations

import os
import sys
from typing import NoReturn

from hydra.errors import HydraException

import oss_exp
from oss_exp.escaping import on_a_screen
from oss_exp.tasks.help import help_text
from oss_exp.tasks.overrides import CONF, is_sweep, refuse_unknown

SWEPT = "Other jobs of the sweep may have run; task=report sweep=FOLDER says which failed."


def main() -> None:
    """Run the program and report errors; the entry point of `oss-exp`."""
    arguments = sys.argv[1:]
    if arguments == ["--version"]:  # Hydra would print its own version
        print(f"oss-exp {oss_exp.__version__}")
        return
    if arguments == ["doctor"]:
        from oss_exp.tasks import doctor

        doctor.report()
        return

    # Help, and overrides that cannot be right.
    try:
        if (text := help_text(arguments, CONF)) is not None:
            print(text, end="")
            return
        refuse_unknown(arguments, CONF)
    except ValueError as refused:
        _end(refused)

    # Jobs.
    from oss_exp.job import run_all

    if (error := run_all(arguments)) is not None:
        is_of_a_job = not isinstance(error, HydraException)  # Hydra's own errors end a sweep
        _end(error, SWEPT if is_sweep(arguments) and is_of_a_job else "")


def _end(error: Exception, hint: str = "") -> NoReturn:
    """End the program with the message of an error that the user's input caused."""
    if os.environ.get("HYDRA_FULL_ERROR", "0") not in ("", "0"):
        raise error

    print(f"oss-exp: {on_a_screen(str(error))}", file=sys.stderr)
    if hint:
        print(hint, file=sys.stderr)
    sys.exit(1)


if __name__ == "__main__":
    main()
