"""Compare the errors that pyright finds with type_errors.json: how many each room may have, 0 where it is not named.

A room is the first folder or file below oss_exp. The numbers may only fall: fails where a room has more errors than
its number, and where it has fewer, so that the number is lowered.
"""

import json
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
NUMBERS = Path(__file__).with_suffix(".json")


def errors_by_room() -> dict[str, list[str]]:
    """Return `file:line message` of every error, by room."""
    command = [
        sys.executable,
        "-m",
        "pyright",
        "--outputjson",
        "--pythonpath",
        sys.executable,
        "oss_exp",
    ]
    answer = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    try:
        report = json.loads(answer.stdout)
    except json.JSONDecodeError:
        sys.exit(f"pyright gave no report: {(answer.stderr or answer.stdout)[-2000:]}")
    if not report["summary"]["filesAnalyzed"]:
        sys.exit(f"pyright found no file below {ROOT}")

    rooms = defaultdict(list)
    for error in report["generalDiagnostics"]:
        if error["severity"] == "error":
            file = Path(error["file"]).relative_to(ROOT)
            line = error["range"]["start"]["line"] + 1
            rooms[file.parts[1]].append(f"{file}:{line} {error['message'].splitlines()[0]}")
    return rooms


def main() -> None:
    errors, allowed = errors_by_room(), json.loads(NUMBERS.read_text())
    faults = []
    for room in sorted(errors.keys() | allowed.keys()):
        count, most = len(errors.get(room, ())), allowed.get(room, 0)
        if count > most:
            faults += [
                *errors[room],
                f"{room} has {count} type errors, {most} are allowed: mend the new ones",
            ]
        elif count < most:
            faults.append(
                f"{room} has {count} type errors: lower its number in .ci/{NUMBERS.name} from {most}"
            )
    sys.exit("\n".join(faults) or 0)


if __name__ == "__main__":
    main()
