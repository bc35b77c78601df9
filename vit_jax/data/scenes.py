"""Scenes of handwritten digits: boxes, masks, stuff and a sentence, made as they are read.

Everything detection and segmentation need, from scikit-learn's 1,797 real pictures alone: digits of
different sizes, rotations and colours lie over each other on textured grounds.
"""

import itertools
import math
from dataclasses import dataclass

import cv2
import numpy as np

from vit_jax.contracts import Dataset, Example
from vit_jax.data.digits import Digits
from vit_jax.data.digits import open as open_digits
from vit_jax.data.geometry import IGNORED, Pixels, boxes_of_masks
from vit_jax.errors import ConfigError, nearest

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
STUFF = ("grass", "stripes", "plain")  # classes 10, 11 and 12 of a segmentation
COLOURS = {
    "red": (225, 40, 40),
    "orange": (245, 145, 30),
    "yellow": (245, 225, 60),
    "green": (50, 200, 70),
    "cyan": (70, 215, 220),
    "blue": (50, 90, 235),
    "pink": (245, 120, 190),
    "white": (245, 245, 245),
}
GROUNDS = {  # darker and duller than any digit
    "grass": ((52, 84, 44), (70, 92, 50), (44, 70, 56)),
    "stripes": ((86, 70, 58), (62, 62, 84), (84, 60, 74)),
    "plain": ((58, 58, 62), (74, 66, 56), (44, 54, 70)),
}
# kind -> (side of the picture, most digits, least and greatest height of a digit)
KINDS = {"easy": (96, 4, (18.0, 44.0)), "hard": (192, 12, (16.0, 64.0))}
LENGTHS = {"train": 100_000, "validation": 500}
STUFF_AS = ("names", "boxes", "none")
SENTENCES = ("one", "all")
TURN = 30.0  # degrees to each side: a six must not become a nine
SEEN = 0.4  # of a digit's pixels at least, under those that lie over it
SMALL, LARGE = 0.33, 0.67  # of the range of heights: what the sentence calls small and large
ENLARGED = 32  # pixels of a digit's side before it is turned
TRIES = 8  # places for one digit, before it is left out


@dataclass(frozen=True)
class Scenes:
    """Scene `index` is a function of (split, seed, index); nothing is kept.

    An example has `image` uint8 [H, W, 3], `boxes` [m, 4] around what is seen of each digit,
    `box_label` [m], `masks` bool [m, H, W] of the pixels seen, `segmentation` uint8 [H, W] with
    every pixel's class, and `captions`, one sentence or all that are true. No digit is covered by
    more than 60 %.

    Attributes:
      split: "train" or "validation".
      source: the digits of that split, none of which is in the other.
      classes: places in `source`, for each of the ten digits.
      side: H = W.
      most: digits in a scene.
      digits: how many there are in each; 0 is any number up to `most`.
      heights: least and greatest, in pixels.
      seed: of all chance.
      stuff_boxes: whether each ground is an object too, as panoptic segmentation has it.
      class_names: "zero" to "nine", and the grounds' names where they count as classes.
      every_sentence: whether each pair of digits has its sentence, both ways.
    """

    split: str
    source: Digits
    classes: tuple[np.ndarray, ...]
    side: int
    most: int
    digits: int
    heights: tuple[float, float]
    seed: int
    stuff_boxes: bool
    class_names: tuple[str, ...]
    every_sentence: bool

    enough_captions = 2000  # tell all words: the sentences are made of about thirty
    things = tuple(range(10))  # classes whose instances count one by one; the rest is stuff

    def __len__(self) -> int:
        return LENGTHS[self.split]

    def name(self, index: int) -> str:
        """Such as `scenes validation 17`."""
        return f"scenes {self.split} {index}"

    def size(self, index: int) -> Pixels:
        """(H, W) of a picture."""
        return self.side, self.side

    def captions(self, index: int) -> tuple[str, ...]:
        """The sentences alone, in a fraction of the time: nothing is painted."""
        return self._made(index, painted=False)["captions"]

    def __getitem__(self, index: int) -> Example:
        return self._made(index, painted=True)

    def _made(self, index: int, painted: bool) -> Example:
        """A scene; one that is not `painted` has `captions` only, and takes the same chances."""
        key = [self.seed, list(LENGTHS).index(self.split)]
        rng = np.random.Generator(np.random.Philox(key=key, counter=[0, 0, 0, int(index)]))
        image, segmentation = self._ground(rng, painted)
        masks: list[np.ndarray] = []
        whole: list[int] = []  # pixels of each digit, were nothing over it
        words: list[tuple[str, str, str]] = []
        labels: list[int] = []
        number = self.digits or int(rng.integers(1, self.most + 1))
        # One that finds no place is left out, unless all are wanted.
        for _ in itertools.count() if self.digits else range(number):
            if len(masks) == number:
                break
            label = int(rng.integers(10))
            colour = list(COLOURS)[int(rng.integers(len(COLOURS)))]
            glyph, height = self._glyph(label, rng)
            place = self._place(glyph > 0.5, masks, whole, rng)
            if place is None:
                continue
            (top, left), (h, w) = place, glyph.shape
            part = (slice(top, top + h), slice(left, left + w))
            shade = np.float32(COLOURS[colour]) * np.float32(rng.uniform(0.85, 1.05))
            ink = glyph > 0.5
            if painted:
                image[part] += glyph[..., None] * (shade - image[part])
                segmentation[part][ink] = label
            for other in masks:
                other[part] &= ~ink
            masks.append(np.zeros((self.side, self.side), bool))
            masks[-1][part] = ink
            whole.append(np.count_nonzero(ink))
            labels.append(label)
            share = (height - self.heights[0]) / (self.heights[1] - self.heights[0])
            size = "small" if share < SMALL else "large" if share > LARGE else ""
            words.append((size, colour, WORDS[label]))
        captions = self._sentences(words, masks, rng)
        if not painted:
            return {"captions": captions}
        if len(self.class_names) == len(WORDS):
            segmentation[segmentation >= len(WORDS)] = IGNORED
        if self.stuff_boxes:
            grounds = [c for c in range(10, 13) if (segmentation == c).any()]
            masks += [segmentation == c for c in grounds]
            labels += grounds
        stacked = np.stack(masks)  # [m, H, W]
        return {
            "image": np.clip(image, 0, 255).astype(np.uint8),
            "boxes": boxes_of_masks(stacked),
            "box_label": np.array(labels, np.int32),
            "masks": stacked,
            "segmentation": segmentation,
            "captions": captions,
        }

    def _ground(
        self, rng: np.random.Generator, painted: bool
    ) -> tuple[np.ndarray, np.ndarray] | tuple[None, None]:
        """One kind, or two on the sides of a line: float32 [H, W, 3], and its classes [H, W]."""
        side = self.side
        kinds = rng.permutation(len(STUFF))[: int(rng.integers(1, 3))]
        image = self._texture(int(kinds[0]), rng, painted)
        classes = np.full((side, side), 10 + kinds[0], np.uint8) if painted else None
        if len(kinds) == 2:
            angle, offset = rng.uniform(0, 2 * math.pi), rng.uniform(-0.25, 0.25) * side
            other = self._texture(int(kinds[1]), rng, painted)
            if painted:
                beyond = self._along(angle) > offset
                cv2.copyTo(other, beyond.view(np.uint8), image)
                classes[beyond] = 10 + kinds[1]
        return image, classes

    def _texture(self, kind: int, rng: np.random.Generator, painted: bool) -> np.ndarray | None:
        side, name = self.side, STUFF[kind]
        tone = GROUNDS[name][int(rng.integers(len(GROUNDS[name])))]
        # Bytes are the cheapest noise there is.
        noise = rng.bytes(side * side)
        if name == "stripes":
            period, direction = rng.uniform(5, 11), rng.uniform(0, math.pi)
        if not painted:
            return None
        noise = np.frombuffer(noise, np.int8).reshape(side, side)
        grey = noise * np.float32(0.26 if name == "grass" else 0.03)  # [H, W]
        if name == "stripes":
            along = self._along(direction) + np.float32(2 * side)
            odd = (along * np.float32(2 / period)).astype(np.int32) & 1
            grey += np.float32(44) * odd - np.float32(22)
        return cv2.merge([grey + np.float32(level) for level in tone])

    def _along(self, angle: float) -> np.ndarray:
        """Each pixel's distance from the middle along a direction: float32 [H, W]."""
        way = np.arange(self.side, dtype=np.float32) - np.float32(self.side / 2)
        return way * np.float32(math.cos(angle)) + way[:, None] * np.float32(math.sin(angle))

    def _glyph(self, label: int, rng: np.random.Generator) -> tuple[np.ndarray, float]:
        """A digit as its opacity, float32 [h, w] without an empty rim, and its upright height."""
        members = self.classes[label]
        grey = self.source.images[members[int(rng.integers(len(members)))]][..., 0]  # [8, 8]
        low, high = self.heights
        height = low * (high / low) ** rng.uniform()
        angle, stretch = rng.uniform(-TURN, TURN), rng.uniform(0.85, 1.15)
        # Enlarged at first, because turning by cubic interpolation takes six times as long.
        grey = cv2.resize(grey, (ENLARGED, ENLARGED), interpolation=cv2.INTER_CUBIC)
        scale = height / ENLARGED
        room = math.ceil(height * 1.7)
        turn = math.radians(angle)
        cos, sin = math.cos(turn) * scale, math.sin(turn) * scale
        matrix = np.array([[cos * stretch, -sin, 0], [sin * stretch, cos, 0]])
        middle = (ENLARGED - 1) / 2
        matrix[:, 2] = (room - 1) / 2 - matrix[:, :2] @ (middle, middle)
        spread = cv2.warpAffine(grey, matrix, (room, room), flags=cv2.INTER_LINEAR)
        # The pen's edge, which eight pixels cannot show, is where grey is a half.
        edge = np.float32(max(height / 16, 1.5) / 255)
        glyph = np.clip((spread.astype(np.float32) - 115) * edge + 0.5, 0, 1)
        inked = glyph > 0.5
        rows, columns = np.flatnonzero(inked.any(1)), np.flatnonzero(inked.any(0))
        return glyph[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1], height

    def _place(
        self,
        ink: np.ndarray,
        masks: list[np.ndarray],
        whole: list[int],
        rng: np.random.Generator,
    ) -> tuple[int, int] | None:
        """(top, left) where a digit covers no other too much; None if it found no such place."""
        h, w = ink.shape
        if h > self.side or w > self.side:
            return None
        seen = [np.count_nonzero(mask) for mask in masks]
        for _ in range(TRIES):
            top = int(rng.integers(self.side - h + 1))
            left = int(rng.integers(self.side - w + 1))
            part = (slice(top, top + h), slice(left, left + w))
            covered = (np.count_nonzero(mask[part] & ink) for mask in masks)
            if all(s - c >= SEEN * n for s, c, n in zip(seen, covered, whole)):
                return top, left
        return None

    def _sentences(
        self,
        words: list[tuple[str, str, str]],
        masks: list[np.ndarray],
        rng: np.random.Generator,
    ) -> tuple[str, ...]:
        """Where one digit lies to another, by chance, or what there is, if it is alone; then, if
        they are wanted, the same of all other pairs.
        """
        first = int(rng.integers(len(words)))
        if len(words) == 1:
            return (_named(words[0]),)
        second = (first + 1 + int(rng.integers(len(words) - 1))) % len(words)
        pairs = [(first, second)]
        if self.every_sentence:
            pairs += [p for p in itertools.permutations(range(len(words)), 2) if p not in pairs]
        boxes = boxes_of_masks(np.stack(masks))
        return tuple(
            f"{_named(words[i])} {_relation(boxes[i], boxes[j])} {_named(words[j])}"
            for i, j in pairs
        )


def _relation(one: np.ndarray, other: np.ndarray) -> str:
    """Where the middle of a box [4] lies, seen from another's."""
    x, y = ((one - other)[:2] + (one - other)[2:]) / 2
    if abs(x) > abs(y):
        return "left of" if x < 0 else "right of"
    return "above" if y < 0 else "below"


def _named(words: tuple[str, str, str]) -> str:
    text = " ".join(word for word in words if word)
    return f"{'an' if text[0] in 'aeiou' else 'a'} {text}"


def open(
    split: str,
    *,
    data_dir: str = "",
    kind: str = "easy",
    size: int = 0,
    seed: int = 0,
    stuff: str = "names",
    digits: int = 0,
    sentences: str = "one",
) -> Dataset:
    """The split "train" (100,000 scenes) or "validation" (500, of digits held out).

    Nothing is read from `data_dir`. The classes are 0 to 9 for the digits and then "grass",
    "stripes" and "plain", the grounds.

    Args:
      split: which one.
      data_dir: not used.
      kind: "easy" is 1 to 4 digits on 96 x 96 pixels, "hard" 1 to 12 on 192 x 192.
      size: the pictures' side; 0 is the kind's. The digits grow with it.
      seed: another one gives other scenes, of the same digits.
      stuff: "names": the grounds are classes of `segmentation`; "boxes": and each is an object with
        a box and a mask too, which adds up to two to a picture (panoptic segmentation); "none":
        there are ten classes only, and the grounds are 255 in `segmentation`, which is ignored.
      digits: how many there are in each scene, at most the kind's; 0 is any number up to that.
      sentences: "one", of a pair chosen by chance, or "all" that are true, that one first.

    Raises:
      ConfigError: if there is no such split or kind, or a size too small to hold a digit.
    """
    if split not in LENGTHS:
        raise ConfigError(f"scenes has no split {split!r}.{nearest(split, LENGTHS)}")
    if kind not in KINDS:
        raise ConfigError(f"data.options.kind={kind!r} does not exist.{nearest(kind, KINDS)}")
    if stuff not in STUFF_AS:
        raise ConfigError(f"data.options.stuff={stuff!r} does not exist.{nearest(stuff, STUFF_AS)}")
    if not isinstance(size, int) or (size and size < 32):
        raise ConfigError(f"data.options.size={size!r} must be 0 or at least 32 pixels")
    if not 0 <= seed < 2**32:
        raise ConfigError(f"data.options.seed={seed!r} must lie between 0 and 2**32 - 1")
    if sentences not in SENTENCES:
        hint = nearest(sentences, SENTENCES)
        raise ConfigError(f"data.options.sentences={sentences!r} does not exist.{hint}")
    side, most, heights = KINDS[kind]
    if not isinstance(digits, int) or not 0 <= digits <= most:
        raise ConfigError(f"data.options.digits={digits!r} must be 0 to {most} in {kind} scenes")
    scale = (size or side) / side
    source = open_digits(split)
    return Scenes(
        split=split,
        source=source,
        classes=tuple(np.flatnonzero(source.labels == label) for label in range(10)),
        side=size or side,
        most=most,
        digits=digits,
        heights=(heights[0] * scale, heights[1] * scale),
        seed=seed,
        stuff_boxes=stuff == "boxes",
        class_names=WORDS if stuff == "none" else WORDS + STUFF,
        every_sentence=sentences == "all",
    )
