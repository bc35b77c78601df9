"""Where PyTorch, timm and transformers are installed: golden arrays, and the table of parity.

python tests/golden/make.py              the golden arrays anew
python tests/golden/make.py --report     docs/parity.md, published sizes, live; --only=swin for some
"""

import argparse
import importlib
import sys
from pathlib import Path

FOLDER = Path(__file__).parent
ROOT = FOLDER.parent.parent


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--report", action="store_true", help="measure parity at published sizes")
    parser.add_argument("--only", default="", help="part of the names of what to measure")
    parser.add_argument("--missing", action="store_true", help="only what is not measured yet")
    options = parser.parse_args()
    # As a script it would find `vit` and `swin` here before those of the package.
    sys.path[0] = str(ROOT)
    if options.report:
        importlib.import_module("tests.golden.report").main(options.only, options.missing)
        return
    for file in sorted(FOLDER.glob("*.py")):
        if file.stem not in ("make", "report", "__init__"):
            print(f"{file.stem} ...", flush=True)
            importlib.import_module(f"tests.golden.{file.stem}").make(FOLDER)


if __name__ == "__main__":
    main()
