"""Weight files of a folder: which they are, and how to read them one tensor at a time."""

import json
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open


def find_weights(folder: Path) -> list[Path]:
    """The weight files of a folder: safetensors before `.bin`, one file before shards, with or without an index.

    An index that names absent files is passed over where the folder holds other weights that are whole.

    Raises:
        FileNotFoundError: there are none, or the index names a file that is not there.
    """
    stale = None
    for single, shards in (("model.safetensors", "*.safetensors"), ("pytorch_model.bin", "pytorch_model*.bin")):
        if (folder / single).is_file():
            return [folder / single]
        index = folder / f"{single}.index.json"
        if index.is_file():
            names = _shards(index)
            absent = [name for name in names if not (folder / name).is_file()]
            if not absent:
                return [folder / name for name in names]
            stale = stale or f"{index} names {', '.join(absent)}, absent from the folder; download every shard."
        if whole := _whole_set(folder, shards):
            return whole
        if index.is_file():
            continue
        if files := sorted(
            file for file in folder.glob(shards) if not file.name.startswith(("adapter_", "gen_head_clear"))
        ):
            return files
    raise FileNotFoundError(
        stale or f"{folder} has no weights; expected model.safetensors, pytorch_model.bin or shards of one of them."
    )


def _whole_set(folder: Path, pattern: str) -> list[Path]:
    """The shards of the only set whose numbers are all there ("model-00001-of-00002…"), else none."""
    sets: dict[tuple[str, str], list[Path]] = {}
    for file in sorted(folder.glob(pattern)):
        if match := re.fullmatch(r"(model|pytorch_model)-\d{5}-of-(\d{5})\.\w+", file.name):
            sets.setdefault(match.groups(), []).append(file)
    whole = [files for (_, total), files in sets.items() if len(files) == int(total)]
    return whole[0] if len(whole) == 1 else []


def _shards(index: Path) -> list[str]:
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{index} is no index of weight files ({error!r}). Get it again.") from error
    if outside := [name for name in names if Path(name).name != name]:
        raise ValueError(f"{index} names {outside[0]}, outside its folder; expected plain file names. Get it again.")
    return names


@contextmanager
def open_weights(file: Path) -> Iterator[tuple[list[str], Callable, Callable]]:
    """`with open_weights(file) as (names, shape, read)`: `shape(name)` is a tuple, `read(name)` a CPU tensor.

    Tensors may be views of the mapped file, valid inside the `with` only: copy what is kept. Pickles are read with
    `weights_only=True`.

    Raises:
        ValueError: the file is cut short or damaged, or is a pickle of anything but tensors by name.
    """
    if file.suffix == ".safetensors":
        try:
            opened = safe_open(file, "pt")
        except SafetensorError as error:
            raise ValueError(f"{file} is cut short or damaged ({error}). Get it again.") from error
        with opened as handle:
            yield list(handle.keys()), lambda name: tuple(handle.get_slice(name).get_shape()), handle.get_tensor
        return
    state = _read_pickle(file)
    yield list(state), lambda name: tuple(state[name].shape), state.__getitem__


def read_tensors(file: Path) -> dict[str, torch.Tensor]:
    """All tensors of a file by name, on the CPU; errors as in [`open_weights`]."""
    with open_weights(file) as (names, _, read):
        return {name: read(name).clone() for name in names}


def _read_pickle(file: Path) -> Mapping[str, torch.Tensor]:
    try:
        try:
            state = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError:  # the format from before PyTorch 1.6 cannot be mapped
            state = torch.load(file, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # unpickling raises UnpicklingError, EOFError, KeyError, RuntimeError and more
        raise ValueError(
            f"{file} is damaged or holds more than tensors ({type(error).__name__}). Pickles can run code, so only "
            "plain tensors are read from them: get it again, or as safetensors."
        ) from error
    if not isinstance(state, Mapping) or not all(isinstance(tensor, torch.Tensor) for tensor in state.values()):
        raise ValueError(f"{file} holds {type(state).__name__} of other things than tensors; expected a state dict.")
    return state
