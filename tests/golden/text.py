"""Tiny tokenizers of the published kinds, and the ids that transformers gives for some texts.

Besides transformers, SigLIP's first version needs sentencepiece and protobuf.
"""

import io
import json
import tempfile
from pathlib import Path

LENGTH = 24
TEXTS = (
    "a woman holding a bat",
    "Croquet playing!",
    "It's 3:00 -- don't wait, it'll rain...",
    "  two   spaces\tand a line\n",
    "na\u00efve caf\u00e9, nai\u0308ve cafe\u0301",
    "\u4f60\u597d world",
    "a smile \U0001f600 [x] {y} ~z~ `q`",
    "UPPER lower MiXeD \u0130\u00df",
    "don\u2019t \u201cquote\u201d \u2014 dash",
    "a photo of a cat.",
    "",
    "a dog and a cat and a dog and a cat and a dog and a cat and a dog and a cat and a dog",
)
WORDS = [
    "a woman holding a bat",
    "two dogs and a cat playing croquet in the rain",
    "a photo of a cat, and don't wait for it's smile",
    "it'll be a photo of two women playing in the world",
] * 5


def make(folder: Path) -> None:
    """Writes `text.json`: for each kind `tokenizer`, what lies beside it, and ids of `TEXTS`."""
    found = {"clip": _clip(), "siglip": _siglip(), "siglip2": _siglip2()}
    (folder / "text.json").write_text(json.dumps(found, ensure_ascii=True, sort_keys=True) + "\n")


def _rows(tokenizer, **arguments) -> list[list[int]]:
    return [
        tokenizer(t, padding="max_length", truncation=True, max_length=LENGTH)["input_ids"]
        for t in TEXTS
    ]


def _saved(tokenizer) -> dict:
    with tempfile.TemporaryDirectory() as place:
        tokenizer.save_pretrained(place)
        return json.loads((Path(place) / "tokenizer.json").read_text())


def _clip() -> dict:
    from tokenizers import pre_tokenizers, trainers
    from transformers import CLIPTokenizer

    start, end = "<|startoftext|>", "<|endoftext|>"
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    blank = CLIPTokenizer()
    ends = [f"{letter}</w>" for letter in letters]
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        initial_alphabet=letters,
        special_tokens=ends,  # else they come in the order of a hash
        end_of_word_suffix="</w>",
        show_progress=False,
    )
    backend = blank.backend_tokenizer
    backend.train_from_iterator(WORDS, trainer)
    state = json.loads(backend.to_str())["model"]
    rest = sorted(state["vocab"], key=state["vocab"].get)
    rest = [p for p in rest if p not in (*letters, *ends, start, end)]
    pieces = [*letters, *ends, *rest, start, end]  # in the order of the published one
    merges = [tuple(pair) for pair in state["merges"]]
    tokenizer = CLIPTokenizer(vocab={p: i for i, p in enumerate(pieces)}, merges=merges)
    beside = {"tokenizer_class": "CLIPTokenizer", "pad_token": end}
    return {"tokenizer": _saved(tokenizer), "beside": beside, "ids": _rows(tokenizer)}


def _siglip() -> dict:
    import sentencepiece
    from transformers import SiglipTokenizer
    from transformers.convert_slow_tokenizer import T5Converter

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([w.replace("'", "").replace(",", "") for w in WORDS]),
        model_writer=model,
        vocab_size=60,
        hard_vocab_limit=False,
        **{"pad_id": 0, "eos_id": 1, "unk_id": 2, "bos_id": -1},
    )
    with tempfile.TemporaryDirectory() as place:
        file = Path(place) / "spiece.model"
        file.write_bytes(model.getvalue())
        tokenizer = SiglipTokenizer(str(file))
        rows = _rows(tokenizer)
        tokenizer.vocab_file, tokenizer._extra_ids = str(file), 0
        backend = T5Converter(tokenizer).converted()
    beside = {"tokenizer_class": "SiglipTokenizer", "pad_token": "</s>", "do_lower_case": True}
    state = json.loads(backend.to_str())
    # Its table of Unicode's normal forms is 320,000 characters long, and TEXTS need NFKC of it.
    steps = state["normalizer"]["normalizers"]
    steps = [{"type": "NFKC"} if step["type"] == "Precompiled" else step for step in steps]
    state["normalizer"]["normalizers"] = steps
    return {"tokenizer": state, "beside": beside, "ids": rows}


def _siglip2() -> dict:
    from tokenizers import models, normalizers, pre_tokenizers, processors, trainers
    from transformers import Siglip2Tokenizer

    marks = ("<pad>", "<eos>", "<bos>", "<unk>")
    tokenizer = Siglip2Tokenizer()
    backend = tokenizer.backend_tokenizer
    backend.model = models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    trainer = trainers.BpeTrainer(vocab_size=360, special_tokens=list(marks), show_progress=False)
    trainer.initial_alphabet = [chr(c) for c in range(97, 123)]
    backend.train_from_iterator(WORDS, trainer)
    state = json.loads(backend.to_str())["model"]
    pieces = sorted(state["vocab"], key=state["vocab"].get)
    pieces += [f"<0x{byte:02X}>" for byte in range(256)]
    merges = [tuple(pair) for pair in state["merges"]]
    tokenizer = Siglip2Tokenizer(vocab={p: i for i, p in enumerate(pieces)}, merges=merges)
    tokenizer.padding_side = "right"
    backend = tokenizer.backend_tokenizer
    backend.post_processor = processors.TemplateProcessing(
        single="$A <eos>", special_tokens=[("<eos>", 1)]
    )
    rows = _rows(tokenizer)
    # The published file does not put text in lower case: the class does.
    backend.normalizer = normalizers.Replace(" ", "\u2581")
    backend.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    beside = {"tokenizer_class": "GemmaTokenizer", "pad_token": "<pad>", "model_type": "siglip2"}
    return {"tokenizer": json.loads(backend.to_str()), "beside": beside, "ids": rows}
