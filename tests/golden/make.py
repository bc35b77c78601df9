"""Makes the golden arrays anew, where PyTorch, timm and transformers are installed.

python tests/golden/make.py
"""

import importlib.util
from pathlib import Path

FOLDER = Path(__file__).parent


def main() -> None:
    for file in sorted(FOLDER.glob("*.py")):
        if file.name in ("make.py", "__init__.py"):
            continue
        spec = importlib.util.spec_from_file_location(file.stem, file)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        print(f"{file.stem} ...", flush=True)
        module.make(FOLDER)


if __name__ == "__main__":
    main()
