"""Compare the errors that pyright reports with the numbers in type_errors.json.

The numbers are by the first folder or file below oss_exp; those that are not listed may have no
error. Numbers may only fall: the check fails where there are more errors than allowed, and also
where there are fewer, so that the number gets lowered.
"""

import json
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
NUMBERS = Path(__file__).with_suffix(".json")


def errors_by_part() -> dict[str, list[str]]:
    """Return `file:line message` of every error, by part of the package."""
    # Run pyright.
    command = [sys.executable, "-m", "pyright", "--outputjson"]
    command += ["--pythonpath", sys.executable, "oss_exp"]
    process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    try:
        report = json.loads(process.stdout)
    except json.JSONDecodeError:
        sys.exit(f"pyright gave no report: {(process.stderr or process.stdout)[-2000:]}")
    if not report["summary"]["filesAnalyzed"]:
        sys.exit(f"pyright found no file below {ROOT}")

    # Sort its errors.
    parts = defaultdict(list)
    for error in report["generalDiagnostics"]:
        if error["severity"] != "error":
            continue
        file = Path(error["file"]).relative_to(ROOT)
        line = error["range"]["start"]["line"] + 1
        parts[file.parts[1]].append(f"{file}:{line} {error['message'].splitlines()[0]}")
    return parts


def main() -> None:
    errors = errors_by_part()
    allowed = json.loads(NUMBERS.read_text())
    faults = []
    for part in sorted(errors.keys() | allowed.keys()):
        count = len(errors.get(part, ()))
        most = allowed.get(part, 0)
        if count > most:
            faults += errors[part]
            faults.append(f"{part}: {count} type errors, {most} allowed; fix the new ones")
        elif count < most:
            faults.append(f"{part}: {count} type errors; lower {most} in .ci/{NUMBERS.name}")
    sys.exit("\n".join(faults) or 0)


if __name__ == "__main__":
    main()
