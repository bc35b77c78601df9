"""A vocabulary from one's own captions: python -m vit_jax.tokenizer --config=... --output=FILE."""

import argparse
import os
import sys
from pathlib import Path
from typing import Any

from vit_jax import command
from vit_jax import main as program
from vit_jax.errors import ConfigError, DataError

USAGE = """Trains a tokenizer, a byte-pair vocabulary of the words that captions use, and shows how
one cuts a text.

  python -m vit_jax.tokenizer --config=configs/clip.py:folder --config.data.data_dir=my_pictures \\
      --output=tokenizer.json
  python -m vit_jax.tokenizer captions.txt more.txt --vocabulary=8000 --output=tokenizer.json
  python -m vit_jax.tokenizer --tokenizer=tokenizer.json --show "a dog chases a cat"
  python -m vit_jax.tokenizer --tokenizer=hf:openai/clip-vit-base-patch32 --show "croquet playing"

It is written as a tokenizer.json, which Hugging Face's tokenizers read too. A run takes it with
--config.data.tokenizer=tokenizer.json; without that, each run trains the same one by itself, of
config.data.vocabulary entries, and keeps it in its folder.

captions     of a config's training split; or the lines of text files, UTF-8: of a line with a tab,
             as in captions.txt, what follows it.
vocabulary   entries at most: 3 marks, the 256 bytes, and what occurs most often. A few hundred are
             enough for sentences of a few dozen words, 8,000 for one's own photographs; CLIP has
             49,408.
lengths      how many tokens the captions have, with start and end: --config.data.length is how many
             a model reads, and longer captions are cut.
"""
DEFAULT = 8000
SHARES = (50, 99, 100)  # of the captions, in percent, whose lengths are told


def captions_in(files: list[str]) -> list[str]:
    """The lines of text files that are not empty.

    Raises:
      DataError: if a file cannot be read, or is not UTF-8, with the line.
    """
    found = []
    for name in files:
        try:
            content = Path(name).read_bytes()
        except OSError as error:
            raise DataError(f"{name} cannot be read: {error.strerror}") from error
        for number, line in enumerate(content.split(b"\n"), 1):
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise DataError(
                    f"line {number} of {name} is not UTF-8 (the byte {line[error.start]:#04x})"
                ) from error
            before, tab, after = text.partition("\t")
            text = (after if tab else before).strip()
            found += [text] if text else []
    return found


def _parse(argv: list[str]) -> tuple[argparse.Namespace, dict[str, Any] | None]:
    """Options, and the config if there is one; ConfigError says what does not go together."""
    parser = argparse.ArgumentParser(
        prog="python -m vit_jax.tokenizer",
        description=USAGE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("files", nargs="*", metavar="FILE", help="texts to train on, in the place of --config")
    add("--config", metavar="FILE[:RECIPE]", help="with --config.KEY=VALUE, as of vit_jax.main")
    add("--vocabulary", type=int, help="entries at most (default the config's, or 8000)")
    add("--output", type=Path, metavar="FILE", help="where to write it")
    add("--tokenizer", metavar="REF", help="do not train: a file, folder, run or hf:OWNER/NAME")
    add("--show", metavar="TEXT", help="print the pieces of a text")
    options, rest = parser.parse_known_args(argv)
    overrides = [a for a in rest if a.startswith("--config.")]
    wrong = next((a for a in rest if a not in overrides), None)
    if wrong:
        raise ConfigError(f"{wrong} is no flag of vit_jax.tokenizer: see --help")
    given = [bool(options.files), options.config is not None, options.tokenizer is not None]
    if sum(given) != 1:
        raise ConfigError("wanted one of these: --config=FILE, text files, or --tokenizer=REF")
    if not options.output and options.show is None:
        raise ConfigError("nothing to do: say --output=tokenizer.json, or --show TEXT")
    if options.output:
        place = options.output.absolute().parent
        if options.output.is_dir() or not place.is_dir() or not os.access(place, os.W_OK):
            wanted = "wanted a file in a folder that exists and can be written"
            raise ConfigError(f"--output={options.output} cannot be written: {wanted}")
    if options.config is None:
        if overrides:
            raise ConfigError(f"{overrides[0]} needs --config=FILE")
        return options, None
    return options, program.parse([f"--config={options.config}", *overrides])[0]


def main(argv: list[str] | None = None) -> int:
    """Runs one command line; returns the exit status."""
    argv = sys.argv[1:] if argv is None else argv

    def body() -> int:
        options, config = _parse(argv)
        command.quiet()
        tokenizer = _trained(options, config) if options.tokenizer is None else _opened(options)
        if options.output:
            tokenizer.save(options.output)
            print(f"written: {options.output}")
        if options.show is not None:
            for number, piece in tokenizer.pieces(options.show):
                print(f"{number:7}  {piece!r}")
        return 0

    return command.guard(body)


def _opened(options: argparse.Namespace) -> Any:
    from vit_jax.vocabulary import open_tokenizer

    if options.vocabulary is not None:
        raise ConfigError("--vocabulary is for training one, and --tokenizer opens one")
    tokenizer = open_tokenizer(options.tokenizer)
    marks = ", ".join(f"{m} {getattr(tokenizer, m)}" for m in ("start", "end", "padding"))
    print(f"{tokenizer.size:,} entries; {marks}")
    return tokenizer


def _trained(options: argparse.Namespace, config: dict[str, Any] | None) -> Any:
    import numpy as np

    from vit_jax.data import pipeline
    from vit_jax.data.text import captions_of, train_tokenizer

    if config is None:
        captions, size = captions_in(options.files), DEFAULT
    else:
        data = config["data"]
        captions = captions_of(
            pipeline.open_dataset(data["name"], "train", data["data_dir"], **data["options"])
        )
        size = data["vocabulary"]
    size = size if options.vocabulary is None else options.vocabulary
    tokenizer = train_tokenizer(captions, size)
    lengths = np.array([len(tokenizer.encode(text)) + tokenizer.marks for text in captions])
    print(f"{len(captions):,} captions, {tokenizer.size:,} entries")
    told = np.percentile(lengths, SHARES, method="inverted_cdf")
    told = ", ".join(f"{share} % at most {most:.0f}" for share, most in zip(SHARES, told))
    print(f"lengths: {told} tokens")
    if config is not None:
        length = config["data"]["length"]
        print(f"config.data.length={length} cuts {(lengths > length).sum():,} of them")
    return tokenizer


if __name__ == "__main__":
    sys.exit(main())
