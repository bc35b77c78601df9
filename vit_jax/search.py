"""Pictures ranked by how near they are to a text, told and drawn."""

import csv
import io
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from vit_jax import pictures
from vit_jax.data.decode import as_rgb

COLUMNS = ("rank", "picture", "similarity")


def ranked(results: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Results of `vit_jax.stream` on `vit_jax.zero_shot.searching` -> rows, the nearest first.

    Returns:
      {"rank" from 1, "picture": path, "similarity": the cosine} of each that could be read.
    """
    found = [
        (result["predictions"][0]["similarity"], result["picture"])
        for result in results
        if "predictions" in result
    ]
    found.sort(key=lambda pair: -pair[0])
    return [
        {"rank": rank, "picture": picture, "similarity": near}
        for rank, (near, picture) in enumerate(found, 1)
    ]


def as_text(rows: list[dict[str, Any]], form: str) -> str:
    """Rows as a table for people, as JSON or as CSV."""
    if form == "json":
        return json.dumps(rows, indent=2) + "\n"
    if form == "csv":
        out = io.StringIO()
        writer = csv.DictWriter(out, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(row | {"similarity": f"{row['similarity']:.6g}"} for row in rows)
        return out.getvalue()
    return "".join(f"{row['similarity']:7.3f}  {row['picture']}\n" for row in rows)


def sheet(path: Path, rows: list[dict[str, Any]], text: str) -> Path:
    """Draws the rows' pictures on one, with ranks and cosines below; returns the path."""
    files = [Path(row["picture"]) for row in rows]
    titles = [
        f"{row['rank']}: {row['similarity']:.3f} {file.name}"
        for row, file in zip(rows, files, strict=True)
    ]
    return pictures.sheet(path, [as_rgb(file) for file in files], titles, text)
