"""Makes the golden arrays anew, where PyTorch, timm and transformers are installed.

python -m tests.golden.make
"""

import importlib
from pathlib import Path

FOLDER = Path(__file__).parent


def main() -> None:
    for file in sorted(FOLDER.glob("*.py")):
        if file.stem not in ("make", "__init__"):
            print(f"{file.stem} ...", flush=True)
            importlib.import_module(f"tests.golden.{file.stem}").make(FOLDER)


if __name__ == "__main__":
    main()
