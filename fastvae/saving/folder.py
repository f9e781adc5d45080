"""A model's folder: ``model.json``, which names the weights' file and its checksum, and that file."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from fastvae._distribution import to_mend
from fastvae._version import __version__
from fastvae.atomic import remove_leftovers, write_atomically
from fastvae.likelihoods import Likelihood
from fastvae.models.base import BaseVAE
from fastvae.saving.settings import (
    OwnPartError,
    build_model,
    build_network,
    build_part,
    network_settings,
    part_settings,
    settings_of,
)

__all__ = ["load", "save"]

_FORMAT, _VERSION = "fastvae model", 1
_CONFIGURATION = "model.json"
_WEIGHTS = re.compile(r"weights-[0-9a-f]{16}\.safetensors")
_LARGEST_CONFIGURATION = 2**20
_PARTS = ("encoder", "decoder", "likelihood", "penalties")


class _NewerError(ValueError):
    pass


def save(model: BaseVAE, folder: str | os.PathLike[str]) -> Path:
    """Write a model to a folder, from which :func:`load` makes it again; see ``BaseVAE.save``."""
    folder = Path(folder)
    config: dict[str, Any] = {"format": _FORMAT, "version": _VERSION, "fastvae": __version__}
    config["torch"] = torch.__version__
    config["model"] = _described(lambda: settings_of(model))
    config["encoder"] = _described(lambda: network_settings(model.encoder))
    config["decoder"] = _described(lambda: network_settings(model.decoder))
    config["likelihood"] = _described(lambda: part_settings(model.likelihood))
    config["penalties"] = _described(lambda: [part_settings(penalty) for penalty in model.penalties])
    config["frozen"] = [name for name, parameter in model.named_parameters() if not parameter.requires_grad]
    data = _packed(model)
    digest = hashlib.sha256(data).hexdigest()
    weights = f"weights-{digest[:16]}.safetensors"
    config["weights"] = {"file": weights, "sha256": digest}
    text = json.dumps(config, indent=1, allow_nan=False) + "\n"
    folder.mkdir(parents=True, exist_ok=True)
    # The weights under a name of their own, then what names them: at any moment the folder holds a whole model.
    write_atomically(folder / weights, lambda file: file.write(data))
    write_atomically(folder / _CONFIGURATION, lambda file: file.write(text.encode()))
    for entry in folder.iterdir():
        if _WEIGHTS.fullmatch(entry.name) and entry.name != weights:
            entry.unlink(missing_ok=True)
    remove_leftovers(folder, re.compile(rf"{_WEIGHTS.pattern}|{re.escape(_CONFIGURATION)}"))
    return folder


def load(
    folder: str | os.PathLike[str],
    *,
    encoder: nn.Module | None = None,
    decoder: nn.Module | None = None,
    likelihood: Likelihood | None = None,
    penalties: Iterable[nn.Module] | None = None,
    model: BaseVAE | None = None,
    device: torch.device | str | None = None,
) -> BaseVAE:
    """A model that ``model.save(folder)`` wrote, in eval mode.

    Nothing in the folder is executed. Networks of ``fastvae.architectures`` and the package's own likelihoods,
    penalties and augmentations are made again by name; whatever else the model was made from is given here, built as
    before, and gets the saved weights.

    Args:
        folder: with ``model.json`` and the weights that it names.
        encoder, decoder, likelihood, penalties: in place of what was saved; needed where that was not the package's
            own, or was changed after it was made.
        model: a model of a class of your own, built as before.
        device: to move it to; None: it stays on the CPU, or where the parts are that are given here.

    Raises:
        FileNotFoundError: no model in the folder.
        ValueError: a file that is damaged, or of a later version of fastvae, with the reason; parts that are missing,
            or whose weights have other names or shapes. What was given is unchanged then.
        ImportError: safetensors is not installed.
    """
    folder = Path(folder)
    path = folder / _CONFIGURATION
    config, weights = _read(folder, path)
    given = {"encoder": encoder, "decoder": decoder, "likelihood": likelihood, "penalties": penalties}
    if model is None:
        with torch.device("cpu"):
            model = _build(path, config, given, weights)
        if device is None:
            # Parts that were given may be elsewhere than those that were made here.
            device = next((parameter.device for parameter in model.parameters()), None)
    elif any(part is not None for part in given.values()):
        raise ValueError("load: model: expected either a whole model or parts of one, got both")
    _fill(model, weights, path)
    frozen = config["frozen"]
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name not in frozen)
    return model.eval() if device is None else model.eval().to(device)


def _described(describe: Callable[[], Any]) -> Any:
    try:
        return describe()
    except OwnPartError as own:
        # To be given at loading.
        return {"own": str(own)}


def _packed(model: nn.Module) -> bytes:
    """Its state as safetensors: tensors of their own each, since that format knows no two names of one."""
    try:
        from safetensors.torch import save as pack
    except ImportError as error:
        raise ImportError(f"save: needs safetensors; {to_mend('safetensors')}") from error
    state = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in model.state_dict().items()}
    return pack(state)


def _damaged(path: Path, why: object) -> ValueError:
    return ValueError(f"{path}: expected what model.save wrote, found a damaged or foreign file ({why})")


def _configuration(path: Path) -> dict[str, Any]:
    try:
        with open(path, "rb") as file:
            text = file.read(_LARGEST_CONFIGURATION + 1)
    except FileNotFoundError:
        raise FileNotFoundError(f"load: expected a folder that model.save wrote, found no {path}") from None
    except NotADirectoryError:
        raise FileNotFoundError(
            f"load: expected a folder that model.save wrote, got a file, {path.parent}"
        ) from None
    try:
        if len(text) > _LARGEST_CONFIGURATION:
            raise ValueError("too long")
        config = json.loads(text)
        if not isinstance(config, dict) or config.get("format") != _FORMAT:
            raise ValueError(f"no {_FORMAT!r}")
        version = config.get("version")
        if isinstance(version, int) and version > _VERSION:
            raise _NewerError(
                f"{path}: expected version {_VERSION} of the format or an earlier one, found version {version}, "
                f"written by fastvae {config.get('fastvae')}; this is {__version__}: install that or a later one"
            )
        if version != _VERSION or isinstance(version, bool):
            raise ValueError(f"version {version!r}")
        for name in (*_PARTS, "model", "weights", "frozen"):
            kinds = {"penalties": (dict, list), "frozen": (list,)}.get(name, (dict,))
            if not isinstance(config.get(name), kinds):
                raise ValueError(f"{name}: {type(config.get(name)).__name__}")
        file, digest = config["weights"].get("file"), config["weights"].get("sha256")
        # Nothing outside of the folder.
        if not (isinstance(file, str) and _WEIGHTS.fullmatch(file) and isinstance(digest, str)):
            raise ValueError(f"weights: {file!r}")
    except _NewerError:
        raise
    except (ValueError, RecursionError) as error:
        raise _damaged(path, error) from error
    return config


def _read(folder: Path, path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Settings and weights of one moment, while others may save."""
    config = _configuration(path)
    try:
        return config, _weights(folder, config, path)
    except ValueError:
        again = _configuration(path)
        if again == config:
            raise
        return again, _weights(folder, again, path)


def _weights(folder: Path, config: dict[str, Any], path: Path) -> dict[str, Tensor]:
    try:
        from safetensors.torch import load as unpack
    except ImportError as error:
        raise ImportError(f"load: needs safetensors; {to_mend('safetensors')}") from error
    file = folder / config["weights"]["file"]
    try:
        data = file.read_bytes()
    except FileNotFoundError as error:
        raise _damaged(path, f"no {file.name} beside it") from error
    if hashlib.sha256(data).hexdigest() != config["weights"]["sha256"]:
        raise _damaged(file, "another checksum than model.json has")
    try:
        return cast("dict[str, Tensor]", unpack(data))
    except Exception as error:
        raise _damaged(file, error) from error


def _build(path: Path, config: dict[str, Any], given: dict[str, Any], weights: dict[str, Tensor]) -> BaseVAE:
    own = config["model"].get("own")
    if own is not None:
        raise ValueError(
            f"{path}: expected model=, a model of your own class, which was {own}, built as before"
        )
    parts = {name: _part(path, name, config[name], given[name], weights) for name in _PARTS}
    try:
        return build_model(config["model"], **parts)
    except Exception as error:
        if any(part is not None for part in given.values()):
            raise ValueError(
                f"{path}: expected parts that fit each other and the saved settings: {error}"
            ) from error
        raise _damaged(path, error) from error


def _part(path: Path, name: str, saved: Any, given: Any, weights: dict[str, Tensor]) -> Any:
    if given is not None:
        return list(given) if name == "penalties" else given
    if isinstance(saved, dict) and "own" in saved:
        raise ValueError(
            f"{path}: expected {name}=, which was none of fastvae's but {saved['own']}, built as before"
        )
    try:
        if name == "penalties":
            return [build_part(penalty) for penalty in saved]
        if name == "likelihood":
            return build_part(saved)
        network = build_network(saved)
        # Before there is memory for what the file says.
        prefix = f"{name}."
        _check_shapes(
            network.state_dict(prefix=prefix), {k: v for k, v in weights.items() if k.startswith(prefix)}
        )
        return network.to_empty(device="cpu")
    except Exception as error:
        raise _damaged(path, f"{name}: {error}") from error


def _fill(model: nn.Module, weights: dict[str, Tensor], path: Path) -> None:
    """Load all weights, in the saved precision, or raise before the first."""
    try:
        _check_shapes(model.state_dict(), weights)
    except ValueError as error:
        raise ValueError(f"{path}: expected the weights of this model, found {error}") from error
    tensors = {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers())}
    for name, tensor in tensors.items():
        if name in weights and tensor.dtype != weights[name].dtype:
            tensor.data = tensor.data.to(weights[name].dtype)
    model.load_state_dict(weights)


def _check_shapes(here: dict[str, Tensor], found: dict[str, Tensor]) -> None:
    """ValueError unless both have the same names and shapes."""
    shapes = [{name: list(tensor.shape) for name, tensor in state.items()} for state in (here, found)]
    unlike = sorted(name for name in here.keys() | found.keys() if shapes[0].get(name) != shapes[1].get(name))
    if unlike:
        was, is_here = (names.get(unlike[0], "nothing") for names in shapes[::-1])
        more = f", and {len(unlike) - 1} more" if len(unlike) > 1 else ""
        raise ValueError(f"{unlike[0]}: {was}, where the model has {is_here}{more}")
