"""Checkpoints: written whole or not at all; read without trust in what they say of themselves."""
import dataclasses
import os
from contextlib import suppress
from pathlib import Path

import torch

from lib.cli import DataError, UsageError
from model import ModelConfig, build
from sources.bins import check_meta


def write_atomically(path, write):
    """write(temporary path), then rename it to path: path is whole or not there. DataError if that fails."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write(temporary)
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:    # torch.save raises the latter for a full disk
        raise DataError(f"cannot write {path}: {getattr(error, 'strerror', None) or error}") from None
    finally:
        with suppress(OSError):
            temporary.unlink()


SCHEMA = dict(stage=str, step=int, time=float, spent=dict, data=dict, model=dict, config=dict,
              optimizers=list, model_config=dict, initial_memory=torch.Tensor)


def load(path, map_location="cpu"):
    """A checkpoint file, or the ckpt.pt of a run's folder, as a dict. DataError if it is missing, truncated
    or not ours."""
    path = Path(path) / "ckpt.pt" if Path(path).is_dir() else Path(path)
    if not path.is_file():
        raise DataError(f"there is no checkpoint {path}")
    try:
        checkpoint = torch.load(path, map_location=map_location, weights_only=True)
        wrong = [name for name, kind in SCHEMA.items() if not isinstance(checkpoint[name], kind)]
        check_meta(checkpoint["data"])
        config, spent, tensors = checkpoint["config"], checkpoint["spent"], checkpoint["model"].values()
        valid = {"step": 0 <= checkpoint["step"] < 2**62,
                 "spent": all(type(spent[key]) in (int, float) and 0 <= spent[key] < 2**63
                              for key in ("tokens", "seconds")),
                 "config": type(config["seq_len"]) is int and config["seq_len"] >= 0
                           and all(isinstance(config[key], str) for key in ("dataset", "init_from")),
                 "model": all(w.dtype == torch.float32 and w.isfinite().all()
                              for w in (checkpoint["initial_memory"], *tensors))}
        wrong += [name for name, is_valid in valid.items() if not is_valid]
    except (PermissionError, torch.OutOfMemoryError):       # not the file's fault
        raise
    except Exception as error:  # noqa: BLE001  torch raises many kinds for a damaged or foreign file
        raise DataError(f"{path} is not a checkpoint, or damaged ({type(error).__name__})") from None
    if wrong:
        raise DataError(f"{path} is not a checkpoint, or damaged: its {wrong[0]} makes no sense")
    return checkpoint


def restore(checkpoint, device="cpu"):
    """What a checkpoint holds: its ModelConfig, its networks with their weights, and m_empty (K, d).
    DataError if it does not fit.
    """
    weights = {key: w for key, w in checkpoint["model"].items() if "." in key}
    names = dict.fromkeys(key.split(".")[0] for key in weights)
    try:
        if not {"updater", "readout"} <= names.keys():
            raise ValueError("it has no updater or no readout")
        config, vocab_size = ModelConfig(**checkpoint["model_config"]), checkpoint["data"]["vocab_size"]
        if max(config.updater_layers, config.encoder_layers, config.decoder_layers) > len(weights) + 8 \
                or max(config.context_len, config.future_len) > 2**20:
            raise ValueError("its sizes make no sense")
        networks = build_with(weights, lambda: build(config, vocab_size, names))
        initial_memory = checkpoint["initial_memory"].view(config.memory_tokens, config.d_model)
    except (RuntimeError, TypeError, ValueError, UsageError) as error:
        raise DataError(f"the checkpoint does not fit this architecture: {error}") from None
    return config, networks.to(device), initial_memory.to(device)


def build_with(weights, make):
    """The module that make() returns, with these weights, a state_dict. ValueError if they do not fit.

    Shapes are compared before anything is allocated: sizes cannot ask for more memory than the weights have.
    """
    with torch.device("meta"):
        shapes = {key: w.shape for key, w in make().state_dict().items()}
    if shapes != {key: w.shape for key, w in weights.items()}:
        raise ValueError("its weights have other shapes than its sizes say")
    module = make()
    module.load_state_dict(weights)
    return module


def find_checkpoint(ckpt, dataset):
    """The given checkpoint, or the one of the data set's most finished run."""
    runs = [Path(f"runs/{dataset}-{stage}") for stage in ("dmt", "smt", "bptt")]
    finished = next((run for run in runs if (run / "ckpt.pt").exists()), runs[0])
    return Path(ckpt).expanduser() if ckpt else finished       # each of several in --ckpt=~/a,~/b


def load_each(ckpt, dataset, device):
    """(name, folder, checkpoint) of each checkpoint of --ckpt, or of the data set's most finished run;
    UsageError if they are not of one data set."""
    paths = [find_checkpoint(path, dataset) for path in dict.fromkeys(ckpt.split(","))]
    folders = [path if path.is_dir() else path.parent for path in paths]
    names, sets = [folder.resolve().name for folder in folders], []
    for path, folder, name in zip(paths, folders, names):
        checkpoint = load(path, device)
        sets.append(checkpoint["data"]["name"])
        if sets[-1] != sets[0]:
            raise UsageError(f"--ckpt mixes data sets: {sets[0]} and {sets[-1]}")
        yield name if names.count(name) == 1 else str(path), folder, checkpoint


def fields_of(cls, config):
    """The fields of a dataclass in a config that extends it, as a dict."""
    return {f.name: getattr(config, f.name) for f in dataclasses.fields(cls)}


def check_data(checkpoint, data, path, warn=None):
    """DataError unless a checkpoint was trained on this data set; if other data have its name, too, or with
    `warn` a warning."""
    both = checkpoint["data"], data.meta
    trained, here = (f"{meta['name']} (vocabulary {meta['vocab_size']})" for meta in both)
    if trained != here:
        raise DataError(f"{path} was trained on {trained}, this data set is {here}")
    if checkpoint["data"].get("fingerprint") != data.meta.get("fingerprint"):
        message = f"{path} was trained on other data of the name {data.meta['name']}: they have changed since"
        if warn is None:
            raise DataError(message)
        warn(f"warning: {message}")


def load_weights(networks, checkpoint, config, path):
    """Load the weights of those networks that a checkpoint has too. DataError where they do not fit."""
    weights = {"initial_memory": checkpoint["initial_memory"], **checkpoint["model"]}
    state = networks.state_dict()
    both = {name.split(".")[0] for name in state} & {name.split(".")[0] for name in weights}
    here, given = ({name: w.shape for name, w in tensors.items() if name.split(".")[0] in both}
                   for tensors in (state, weights))
    wrong = [name for name in here | given if here.get(name) != given.get(name)]
    for name in {"n_heads", "updater", "encoder"} & checkpoint["model_config"].keys():  # no shape shows these
        value = checkpoint["model_config"][name]
        wrong += [f"--{name}={value}"] * (getattr(config, name, value) != value)
    if wrong or not both:
        raise DataError(f"{path} has another architecture: {(wrong or ['no network'])[0]} does not fit")
    networks.load_state_dict({name: weights[name] for name in here}, strict=False)


def source_of(checkpoint):
    """The checkpoint (file or folder of a run) that a run started from; None if from fresh weights."""
    source = checkpoint["config"]["init_from"]
    return Path(source) if source else None


def newer_source(checkpoint):
    """The checkpoint file that a run started from, if it has been replaced since; else None."""
    source = source_of(checkpoint)
    path = source / "ckpt.pt" if source and source.is_dir() else source
    return path if path and path.is_file() and path.stat().st_mtime > checkpoint["time"] else None
