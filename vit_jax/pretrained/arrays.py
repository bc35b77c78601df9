"""Files of arrays, read one array at a time: safetensors, NumPy's npz, PyTorch's pickles.

None of them can run code: npz is read without pickles, PyTorch's files with weights only.
"""

import hashlib
import json
import re
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from vit_jax.errors import CheckpointError

INDEX = ".index.json"
# Names that carry the start of the file's own SHA-256, as PyTorch's hub has it: model-a1311bcf.pth
HASHED = re.compile(r"-(?=[0-9]*[a-f])([0-9a-f]{8,64})\.")  # digits alone are a date


class Arrays(Mapping):
    """Arrays by name, each read from its file when it is asked for.

    Attributes:
      shapes: of all arrays, known without reading them.
      dtypes: their names, such as "float32".
    """

    def __init__(
        self,
        shapes: Mapping[str, tuple[int, ...]],
        dtypes: Mapping[str, str],
        get: Callable[[str], np.ndarray],
    ):
        """`get` reads one array by its name."""
        self.shapes, self.dtypes, self._get = dict(shapes), dict(dtypes), get

    def __getitem__(self, name: str) -> np.ndarray:
        if name not in self.shapes:
            raise KeyError(name)
        return self._get(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)

    def renamed(self, names: Mapping[str, str]) -> "Arrays":
        """The same arrays by other names: {new: old}; others are left out."""
        return Arrays(
            {new: self.shapes[old] for new, old in names.items()},
            {new: self.dtypes[old] for new, old in names.items()},
            lambda name: self[names[name]],
        )


def open_safetensors(path: Path) -> Arrays:
    """A `.safetensors` file, or the `.safetensors.index.json` of a model in several.

    Raises:
      CheckpointError: if a file is missing, cut short, damaged, or lies outside the folder.
    """
    files = _shards(path) if path.name.endswith(INDEX) else [path]
    shapes, dtypes, place = {}, {}, {}
    for file in files:
        with _safetensors(file) as opened:
            for name in opened.keys():  # noqa: SIM118  it is no mapping
                part = opened.get_slice(name)
                shapes[name] = tuple(part.get_shape())
                dtypes[name] = _dtype_name(part.get_dtype())
                place[name] = file

    def get(name: str) -> np.ndarray:
        # Opened for each array: what stays mapped would count as memory in use.
        with _safetensors(place[name]) as opened:
            return opened.get_tensor(name)

    return Arrays(shapes, dtypes, get)


def _dtype_name(code: str) -> str:
    """Of safetensors: "F32" -> "float32", "BF16" -> "bfloat16"."""
    kinds = {"F": "float", "BF": "bfloat", "I": "int", "U": "uint"}
    found = re.fullmatch(r"([A-Z]+?)(\d+)", code)
    return kinds[found[1]] + found[2] if found and found[1] in kinds else code.lower()


def _shards(index: Path) -> list[Path]:
    try:
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise CheckpointError(f"{index} is no index of safetensors files: {error}") from error
    files = []
    for name in names:
        if not isinstance(name, str) or Path(name).name != name or name in ("", ".", ".."):
            raise CheckpointError(f"{index} names {name!r}, which leaves its folder: refused")
        files.append(index.parent / name)
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise CheckpointError(
            f"{index.parent} lacks {len(missing)} of the {len(files)} files that {index.name} "
            f"names: {', '.join(missing[:5])}"
        )
    return files


@contextmanager
def _safetensors(file: Path) -> Iterator[Any]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="numpy") as opened:
            yield opened
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{file} is damaged, cut short or no safetensors: {error}") from error


def open_npz(path: Path) -> Arrays:
    """A `.npz` file, never unpickled; CheckpointError if it is damaged or holds objects."""
    shapes, dtypes = {}, {}
    try:
        with zipfile.ZipFile(path) as archive:
            for member in archive.namelist():
                with archive.open(member) as file:
                    version = np.lib.format.read_magic(file)
                    header = getattr(np.lib.format, f"read_array_header_{version[0]}_0")
                    shape, _, dtype = header(file)
                name = member.removesuffix(".npy")
                if dtype.hasobject:
                    raise CheckpointError(
                        f"{path}: {name} holds pickled objects, which could run code: refused"
                    )
                shapes[name], dtypes[name] = shape, dtype.name
    except (OSError, ValueError, AttributeError, zipfile.BadZipFile) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{path} is damaged, cut short or no npz: {error}") from error

    def get(name: str) -> np.ndarray:
        try:
            with np.load(path, allow_pickle=False) as opened:
                return opened[name]
        except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
            raise CheckpointError(f"{path}: {name} is damaged: {error}") from error

    return Arrays(shapes, dtypes, get)


def open_pth(path: Path) -> Arrays:
    """A `.pth`, `.pt` or `.bin` of PyTorch, which must be installed; weights only.

    What a training script saved around the weights ("model", "state_dict", "model_ema") is
    looked into; prefixes of wrappers ("module.") are taken off.

    Raises:
      CheckpointError: without PyTorch, if the file would run code, or if it holds no weights.
    """
    try:
        import torch
    except ImportError as error:
        raise CheckpointError(
            f"{path.name} is a PyTorch pickle and PyTorch is not installed. Install it (pip "
            "install torch), or convert it where it is: safetensors.torch.save_file(torch.load("
            f"{path.name!r}, weights_only=True), 'model.safetensors')"
        ) from error
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=_is_zip(path))
    except Exception as error:  # pickle, zip and torch raise many types
        reason = str(error).strip().splitlines()[0][:200]
        if "weights_only" in str(error) or "Unsupported" in str(error) or "GLOBAL" in str(error):
            reason = f"it holds more than weights, and loading it could run code ({reason})"
        raise CheckpointError(f"{path} was not read: {reason}") from error
    state = _state_dict(loaded, torch)
    if not state:
        raise CheckpointError(f"{path} holds no weights (a mapping of names to tensors)")

    def get(name: str) -> np.ndarray:
        tensor = state[name].detach().contiguous()
        if tensor.dtype == torch.bfloat16:
            import ml_dtypes

            return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
        return tensor.numpy()

    return Arrays(
        {name: tuple(tensor.shape) for name, tensor in state.items()},
        {name: str(tensor.dtype).removeprefix("torch.") for name, tensor in state.items()},
        get,
    )


def _is_zip(path: Path) -> bool:
    """PyTorch can map only its newer files, which are zip archives."""
    return zipfile.is_zipfile(path)


def _state_dict(loaded: Any, torch: Any) -> dict[str, Any]:
    for wrapper in ("model_ema", "state_dict_ema", "state_dict", "model", "module", "teacher"):
        if isinstance(loaded, Mapping) and isinstance(loaded.get(wrapper), Mapping):
            return _state_dict(loaded[wrapper], torch)
    if not isinstance(loaded, Mapping):
        return {}
    state = {str(k): v for k, v in loaded.items() if isinstance(v, torch.Tensor)}
    for prefix in ("module.", "backbone.", "_orig_mod."):
        if state and all(name.startswith(prefix) for name in state):
            state = {name.removeprefix(prefix): value for name, value in state.items()}
    return state


def check_hash(path: Path) -> str:
    """Compares a file with the SHA-256 that it came with, if it came with one.

    That is the start of it in the name (`deit_tiny-a1311bcf.pth`), a file beside it
    (`model.safetensors.sha256`, as `sha256sum` writes it), or the name that the Hugging Face cache
    stores it under.

    Returns:
      What was compared, for a person; empty if there was nothing to compare with.

    Raises:
      CheckpointError: if they differ.
    """
    wanted, where = "", ""
    beside = path.with_name(path.name + ".sha256")
    stored = path.resolve().name
    if beside.is_file():
        wanted, where = (beside.read_text().split() or [""])[0].lower(), beside.name
    elif re.fullmatch(r"[0-9a-f]{64}", stored):
        wanted, where = stored, "the cache"
    elif found := HASHED.search(path.name):
        wanted, where = found[1], "its name"
    if not wanted:
        return ""
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if not found.startswith(wanted):
        raise CheckpointError(
            f"{path} is damaged or another file: its SHA-256 is {found[: len(wanted)]}, and "
            f"{where} says {wanted}"
        )
    return f"SHA-256 as {where} says"
