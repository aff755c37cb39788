"""Put the committed result of a study into its page of the documentation.

    python -m benchmarks.studies runs/studies/simultaneous-rl/result.json   # commit a result
    python -m benchmarks.studies                                            # fill the page again

Everything measured on the page comes from this program; without a result it says so.
"""

import argparse
import json
from pathlib import Path

from benchmarks.cpu import RESULTS
from benchmarks.page import NOTHING, ROOT, fill

from nemotron3.config import from_record, write_json
from nemotron3.studies.simultaneous_rl.page import as_markdown
from nemotron3.studies.simultaneous_rl.result import StudyResult

PAGE = ROOT / "docs" / "studies" / "simultaneous-rl.md"
RESULT = RESULTS / "study-simultaneous-rl.json"


def filled(text: str, result: StudyResult | None) -> str:
    """The text of the page with the result between its marks."""
    return fill(text, "result", NOTHING if result is None else as_markdown(result))


def read_result(file: Path) -> StudyResult:
    """The result that a study has written."""
    return from_record(StudyResult, json.loads(file.read_text(encoding="utf-8")))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("result", type=Path, nargs="?", help="result.json of a finished study")
    given = parser.parse_args().result
    if given is not None:
        write_json(RESULT, read_result(given))
    result = read_result(RESULT) if RESULT.exists() else None
    PAGE.write_text(filled(PAGE.read_text(encoding="utf-8"), result), encoding="utf-8")
    print(PAGE)


if __name__ == "__main__":
    main()
