"""The pictures in a run's folder: curves.png, predictions.png, batch.png.

Drawn with Matplotlib's objects, without its global state and without a display.
"""

import os
import textwrap
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, PercentFormatter
from PIL import Image

from vit_jax.report import read_metrics

# Okabe and Ito's colours, which the colour-blind tell apart.
BLUE, ORANGE, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#555555"
SPLITS = {
    "train": ("training", BLUE, "-"),
    "validation": ("validation", ORANGE, "-"),
    "validation_ema": ("validation, mean of parameters", GREEN, "--"),
}
SMALL = {"learning_rate": "learning rate", "grad_norm": "gradient norm"}  # the lower panels
PERCENT_TICKS = (0.0, 0.25, 0.5, 0.75, 0.9, 0.95, 0.98, 0.99, 1.0)  # of a stretched axis
NEAR_ONE = 0.004  # errors below this are not told apart on it
DPI = 100
CELL, GAP, LINE_HEIGHT, MARGIN = 128, 16, 15, 18  # pixels of a contact sheet
LINE_LENGTH = 20  # characters that fit below a picture of that cell
COLUMNS = 8  # of pictures of that cell
HEADLINES = ("accuracy", "pq", "miou", "ap")  # what a task may be judged by, in that order


def curves(workdir: str | Path, headline: str = "") -> Path | None:
    """Draws curves.png from metrics.jsonl: loss and headline, learning rate and gradient norm.

    The training curve is a running mean, with the raw one faintly behind it.

    Args:
      workdir: the run's folder.
      headline: the number that the task is judged by, a share of 1; "" is the first of `HEADLINES`
        that the rows have.

    Returns:
      The picture's path, or None while there are no rows.
    """
    rows = read_metrics(workdir)
    if not rows:
        return None
    names = list(dict.fromkeys(name for row in rows for name in row))
    chosen = (headline,) if headline else HEADLINES
    headline = next((n for n in chosen if n in names and not n.endswith("loss")), "")
    large = [n for n in ("loss", headline) if n in names]
    small = [n for n in SMALL if n in names]
    columns = 2 if max(len(large), len(small)) > 1 else 1

    width, height = 6.2 * columns, 6.6 if small else 5.0  # inches
    figure = Figure(figsize=(width, height), dpi=DPI)
    grid = figure.add_gridspec(
        1 + bool(small),
        columns,
        height_ratios=[3, 1][: 1 + bool(small)],
        # Fixed margins, and titles with a fixed height (y=1.0): finding them takes Matplotlib as
        # long as all the rest.
        left=0.75 / width,
        right=1 - 0.75 / width,
        bottom=0.65 / height,
        top=1 - 0.75 / height,
        wspace=0.3,
        hspace=0.42,
    )
    for column, name in enumerate(large):
        _large_panel(figure.add_subplot(grid[0, column]), rows, name, percent=name == headline)
    for column, name in enumerate(small):
        _small_panel(figure.add_subplot(grid[1, column]), rows, name)
    figure.suptitle(_title(Path(workdir), rows, headline), fontsize=13, y=0.98, parse_math=False)
    return _save(figure, Path(workdir) / "curves.png")


def _series(rows: list[dict], split: str, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps and values of one curve; NaN where a value is not finite."""
    chosen = [(row["step"], row[name]) for row in rows if row["split"] == split and name in row]
    steps, values = np.array(chosen, float).reshape(-1, 2).T
    return steps, np.where(np.isfinite(values), values, np.nan)


def smooth(values: np.ndarray) -> np.ndarray:
    """The mean over a window of about a tenth of the curve, shorter at its ends; skips NaN."""
    half, at = len(values) // 20, np.arange(len(values))
    first, end = np.maximum(at - half, 0), np.minimum(at + half + 1, len(values))
    known = np.isfinite(values)
    total = np.insert(np.cumsum(np.where(known, values, 0.0)), 0, 0.0)
    count = np.insert(np.cumsum(known), 0, 0)
    mean = (total[end] - total[first]) / np.maximum(count[end] - count[first], 1)
    return np.where(known, mean, np.nan)


def _large_panel(axes: Axes, rows: list[dict], name: str, percent: bool) -> None:
    axes.set_title(_words(name), fontsize=11, fontweight="bold", loc="left", y=1.0)
    _dress(axes, rows)
    everything, labels = [], []
    for split, (label, color, line) in SPLITS.items():
        steps, values = _series(rows, split, name)
        if not np.isfinite(values).any():
            continue
        smoothed = smooth(values) if split == "train" else values
        if split == "train" and len(values) >= 20:
            axes.plot(steps, values, color=color, alpha=0.25, linewidth=0.8)
        dots = "o" if len(steps) == 1 or (split != "train" and len(steps) <= 60) else None
        if split != "train" and len(steps) > 1:
            at = np.nanargmax(values) if percent else np.nanargmin(values)
            label += f" (★ {_value(values[at], percent)})"
            axes.plot(
                steps[at], values[at], "*", color=color, markersize=11, zorder=5, clip_on=False
            )
        style = {"color": color, "linewidth": 1.8, "marker": dots, "markersize": 3.5}
        axes.plot(steps, smoothed, line, label=label, clip_on=False, **style)
        everything.append(values[np.isfinite(values)])
        last = smoothed[np.isfinite(smoothed)][-1]
        labels.append((last, _value(last, percent), color))
    if not everything:
        axes.text(0.5, 0.5, "no finite number", ha="center", transform=axes.transAxes)
        return
    everything = np.concatenate(everything)
    if not percent:
        if everything.min() > 0 and everything.max() > 20 * everything.min():
            axes.set_yscale("log")
        else:
            axes.ticklabel_format(axis="y", useOffset=False)
    else:
        if everything.max() > 0.9:  # where runs differ by what they still get wrong
            axes.set_yscale("function", functions=(_stretch, _unstretch))
            axes.yaxis.set_major_locator(FixedLocator(PERCENT_TICKS))
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, symbol=" %", decimals=0))
        low, high = min(everything.min(), 0.9), everything.max()
        top = 1.0 if high > 0.5 else max(1.2 * high, 0.05)
        axes.set_ylim(max(low - 0.05 * (top - low), 0.0), top)
    axes.legend(frameon=False, fontsize=9, loc="lower right" if percent else "upper right")
    _label_ends(axes, labels)


def _stretch(accuracy: np.ndarray) -> np.ndarray:
    return -np.log(1.0 + NEAR_ONE - np.minimum(accuracy, 1.0))


def _unstretch(height: np.ndarray) -> np.ndarray:
    return 1.0 + NEAR_ONE - np.exp(-height)


def _label_ends(axes: Axes, labels: list[tuple[float, str, str]]) -> None:
    """Writes the last values beside the right edge, pushed apart where they would overlap."""
    axes.autoscale_view()
    place = axes.transAxes.inverted()
    heights = [place.transform(axes.transData.transform((0, v)))[1] for v, _, _ in labels]
    order = np.argsort(heights)
    apart = 0.05 * np.arange(len(labels))
    places = np.maximum.accumulate(np.array(heights)[order] - apart) + apart  # pushed up
    places = np.minimum(places, 1.0 - apart[::-1])  # and back, below the upper edge
    for at, height in zip(order, places):
        _, text, color = labels[at]
        style = {"color": color, "fontsize": 9, "va": "center", "transform": axes.transAxes}
        axes.text(1.015, height, text, **style)


def _small_panel(axes: Axes, rows: list[dict], name: str) -> None:
    steps, values = _series(rows, "train", name)
    dots = "o" if len(steps) == 1 else None
    axes.plot(steps, values, color=GREY, linewidth=1.2, marker=dots, clip_on=False)
    known = values[np.isfinite(values)]
    if name == "grad_norm" and len(known) and known.min() > 0 and known.max() > 100 * known.min():
        axes.set_yscale("log")
    else:
        axes.set_ylim(bottom=min(0.0, known.min(initial=0.0)))
    axes.set_title(SMALL[name], fontsize=10, loc="left", y=1.0)
    _dress(axes, rows)
    if len(known):
        _label_ends(axes, [(known[-1], f"{known[-1]:.2g}", GREY)])


def _dress(axes: Axes, rows: list[dict]) -> None:
    """Quiet frame and grid; whole epochs below where there are some, with their steps."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25, linewidth=0.6)
    axes.tick_params(labelsize=9)
    last = max(rows, key=lambda row: row["step"])
    steps, epochs = max(last["step"], 1), last["epoch"]
    axes.set_xlim(0, steps)
    if epochs >= 2:
        ticks = MaxNLocator(6, integer=True).tick_values(0, epochs)
        per_epoch = steps / epochs
        axes.xaxis.set_major_locator(FixedLocator(ticks[ticks <= epochs] * per_epoch))
        axes.xaxis.set_major_formatter(
            FuncFormatter(lambda step, _: f"{step / per_epoch:.0f}\n({step:,.0f})")
        )
        axes.set_xlabel("epoch (step)", fontsize=9)
    else:
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        axes.set_xlabel("step", fontsize=9)


def _value(value: float, percent: bool) -> str:
    return f"{100 * value:.2f} %" if percent else f"{value:.4g}"


def _words(name: str) -> str:
    """What a number is called above a panel: abbreviations in capitals."""
    written = {"ap": "AP", "miou": "mIoU", "pq": "PQ", "bleu4": "BLEU-4"}
    return written.get(name, name.replace("_", " "))


def _title(workdir: Path, rows: list[dict], headline: str) -> str:
    name = workdir.resolve().name
    best = None
    if headline:
        kept = [r for r in rows if r["split"] != "train" and np.isfinite(r.get(headline, np.nan))]
        best = max(kept, key=lambda r: r[headline], default=None)
    if best is None:
        return f"{name}: step {rows[-1]['step']:,}"
    return (
        f"{name}: best validation {_words(headline)} {_value(best[headline], True)} "
        f"at step {best['step']:,} (epoch {best['epoch']:.3g})"
    )


def fitting(cell: int) -> int:
    """How many pictures make a sheet of a few screens, if each is drawn within `cell` pixels."""
    return 4 * _columns(cell)


def _columns(cell: int) -> int:
    return max(COLUMNS * (CELL + GAP) // (cell + GAP), 1)


def predictions(
    workdir_or_path: str | Path,
    pictures: Sequence[tuple[np.ndarray, str, bool | None]],
    cell: int = CELL,
) -> Path:
    """Draws predictions.png: pictures with a green frame where right and a red one where wrong.

    Args:
      workdir_or_path: the picture's path, or the folder of a predictions.png.
      pictures: (uint8 [H, W, 3] of any size, title, whether it is right; None has no frame).
      cell: pixels that the longer side of each has on the sheet, about.

    Returns:
      The picture's path.
    """
    path = Path(workdir_or_path)
    path = path / "predictions.png" if path.is_dir() else path
    judged = [right for _, _, right in pictures if right is not None]
    header = f"{sum(map(bool, judged))} of {len(judged)} right"
    return _sheet(
        path,
        [picture for picture, _, _ in pictures],
        [title for _, title, _ in pictures],
        [None if right is None else GREEN if right else ORANGE for _, _, right in pictures],
        header if judged or not pictures else f"{len(pictures)} held-out pictures",
        cell,
    )


def sheet(
    path: str | Path,
    pictures: Sequence[np.ndarray],
    titles: Sequence[str],
    header: str,
    cell: int = CELL,
) -> Path:
    """Draws pictures, uint8 [H, W, 3] of any size, with a title below each; returns the path."""
    return _sheet(Path(path), pictures, titles, [None] * len(pictures), header, cell)


def unstandardised(
    images: np.ndarray, mean: Sequence[float] | float, std: Sequence[float] | float
) -> np.ndarray:
    """A batch as the model sees it -> uint8 pictures.

    Args:
      images: [B, H, W, 3] float32, standardised.
      mean: what was subtracted from channels in [0, 1], one number or one for each.
      std: what the difference was divided by, likewise.
    """
    images = np.asarray(images, np.float32) * np.float32(std) + np.float32(mean)
    return (255 * np.clip(images, 0, 1) + 0.5).astype(np.uint8)


def _sheet(
    path: Path,
    pictures: Sequence[np.ndarray],
    titles: Sequence[str],
    colors: Sequence[str | None],
    header: str,
    cell: int,
) -> Path:
    """A grid of pictures with titles below them and frames around those that have a colour."""
    texts = [_wrap(title, LINE_LENGTH * cell // CELL) for title in titles]
    lines = max((text.count("\n") + 1 for text in texts), default=1)
    columns = min(max(len(pictures), 1), _columns(cell))
    rows = -(-len(pictures) // columns)
    fitted = [_fit(picture, cell) for picture in pictures]
    # No higher than the highest picture, where those are large and wide.
    tall = cell if cell <= CELL else max((picture.shape[0] for picture in fitted), default=cell)
    step_x, step_y = cell + GAP, tall + GAP + lines * LINE_HEIGHT
    width = max(columns * step_x - GAP + 2 * MARGIN, 420)  # the header's width
    top = 2 * MARGIN + LINE_HEIGHT
    height = top + rows * step_y
    canvas = np.full((height, width, 3), 255, np.uint8)
    figure = Figure(figsize=(width / DPI, height / DPI), dpi=DPI)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.axis("off")
    axes.set(xlim=(0, width), ylim=(height, 0))
    axes.text(MARGIN, MARGIN, header, fontsize=11, va="top", parse_math=False)
    for i, (picture, text, color) in enumerate(zip(fitted, texts, colors, strict=True)):
        x, y = MARGIN + (i % columns) * step_x, top + (i // columns) * step_y
        h, w = picture.shape[:2]
        left, upper = x + (cell - w) // 2, y + (tall - h) // 2 if cell <= CELL else y
        canvas[upper : upper + h, left : left + w] = picture
        if color:
            corner = (left - 2, upper - 2)
            axes.add_patch(Rectangle(corner, w + 4, h + 4, fill=False, color=color, linewidth=2.5))
        axes.text(
            x + cell / 2,
            (y + tall if cell <= CELL else upper + h) + 5,
            text,
            color=color or "black",
            fontsize=8,
            ha="center",
            va="top",
            parse_math=False,
        )
    axes.imshow(canvas, extent=(0, width, height, 0), interpolation="nearest", zorder=0)
    return _save(figure, path)


def _fit(picture: np.ndarray, cell: int = CELL) -> np.ndarray:
    """Enlarged by a whole factor, so that pixels stay pixels, or made smaller, to fit a cell.

    In a large cell, whose pictures may have a legend below, the height may be half as much again.
    """
    h, w = picture.shape[:2]
    high = cell if cell <= CELL else cell * 3 // 2
    factor = min(cell // w, high // h)
    if factor:
        return np.repeat(np.repeat(picture, factor, 0), factor, 1)
    scale = min(cell / w, high / h)
    size = (max(round(w * scale), 1), max(round(h * scale), 1))
    return np.asarray(Image.fromarray(picture).resize(size, Image.Resampling.LANCZOS))


def _wrap(title: str, length: int = LINE_LENGTH) -> str:
    """At most three lines that fit below a picture; what is too long loses its middle."""
    words = title.encode("utf-8", "replace").decode().replace(" %", "\N{NO-BREAK SPACE}%")
    words = " ".join(_shorten(word, length) for word in words.split(" "))
    lines = textwrap.wrap(words, length)
    return "\n".join([*lines[:2], _shorten(" ".join(lines[2:]), length)][: len(lines)])


def _shorten(text: str, length: int) -> str:
    if len(text) <= length:
        return text
    return text[: length // 2] + "…" + text[1 - length // 2 :]


def _save(figure: Figure, path: Path) -> Path:
    """Writes the whole picture or none: a viewer may have the old one open."""
    new = path.with_name(path.name + ".tmp")
    with warnings.catch_warnings():
        # A class's name may be in a script that the font lacks; it is drawn as boxes.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        FigureCanvasAgg(figure).print_png(new)
    os.replace(new, path)
    return path
