"""Prepare a data set: make its bins from a generator, a download or files. `data.py` is what you run, and
says what is written."""
import fcntl
import hashlib
import json
import shutil
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from lib.checkpoints import write_atomically
from lib.cli import DataError, UsageError
from lib.seeds import philox
from sources import download, fables, tasks
from sources.bins import documents_end
from sources.files import chunks, write_split

GENERATED = ["fables", *tasks.TASKS]
DATASETS = [*GENERATED, "tinystories", "mnist", "sketchy", "text"]
NEEDS_SOURCE = {"sketchy": "the folder of pictures", "text": "the text file"}
STATISTICS = "entropy_per_character", "fact_share", "forgetting_cost"     # of fables, in the summary
TRAIN_TOKENS, VAL_TOKENS = 8_000_000, 500_000       # of generated data


def prepare(name, data_dir, source=None, seed=0, train_tokens=TRAIN_TOKENS, val_tokens=VAL_TOKENS, anew=True,
            **options):
    """Make the data set data_dir/name, whole or not at all, and print what is in it.

    source: file or folder with the original files; unset: they are downloaded. options: of the task.
    A data set that is there is replaced once the new one is complete; with anew=False it is left as it is.
    """
    options = check_request(name, source, seed, train_tokens, val_tokens, options)
    folder = Path(data_dir) / name
    made, old = folder.with_name(f".{name}.new"), folder.with_name(f".{name}.old")
    try:
        with locked(folder, old):
            if folder.exists() and not (folder / "meta.json").is_file():
                raise DataError(f"{folder} is not a data set: move it, or choose another --data_dir")
            if folder.exists() and not anew:
                return
            shutil.rmtree(made, ignore_errors=True)         # of a process that was killed
            try:
                made.mkdir()
                meta = {"name": name, "seed": seed, "options": options}
                if name in GENERATED:
                    meta |= write_generated(made, name, seed, (train_tokens, val_tokens), options)
                else:
                    rng = philox(seed, 0, "split")
                    meta |= download.convert(name, made, source, Path(data_dir) / "downloads", rng)
                meta = finish(made, meta)
                if folder.exists():
                    folder.rename(old)
                made.rename(folder)
                shutil.rmtree(old, ignore_errors=True)
            finally:
                shutil.rmtree(made, ignore_errors=True)
    except MemoryError:
        raise DataError(f"cannot make {folder}: there is not enough memory") from None
    except OSError as error:
        raise DataError(f"cannot make {folder}: {error.filename or ''} {error.strerror or error}") from None
    print(summary(meta, folder))


@contextmanager
def locked(folder, old):
    """Inside, no other process prepares this data set. What a killed one had moved to `old` is put back, or
    deleted where its successor is there."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with open(folder.with_name(f".{folder.name}.lock"), "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        if old.exists():
            shutil.rmtree(old) if folder.exists() else old.rename(folder)
        yield


def ensure(name, data_dir):
    """Prepare a data set that is not there yet. Of several processes one prepares it, the others wait."""
    if not (Path(data_dir) / name / "meta.json").exists():
        prepare(name, data_dir, anew=False)


def check_request(name, source, seed, train_tokens, val_tokens, options):
    """The task options that are set; UsageError if the request makes no sense."""
    if name not in DATASETS:
        raise UsageError(f"there is no data set {name!r}; all are {', '.join(DATASETS)}")
    options = {key: value for key, value in options.items() if value not in (None, "")}
    allowed = list(tasks.OPTIONS.get(name, {}))
    for key in options.keys() - allowed:
        has = f"has {', '.join('--' + k for k in allowed)}" if allowed else "has no options of its own"
        raise UsageError(f"{name} has no option --{key}; it {has}")
    if name in GENERATED and source:
        raise UsageError(f"{name} is generated: it takes no --source")
    if name not in GENERATED and (train_tokens, val_tokens) != (TRAIN_TOKENS, VAL_TOKENS):
        raise UsageError(f"{name} is not generated: it takes no --train_tokens and no --val_tokens")
    if name in NEEDS_SOURCE and not source:
        raise UsageError(f"{name} needs {NEEDS_SOURCE[name]}: python data.py --dataset={name} --source=PATH")
    if seed < 0 or min(train_tokens, val_tokens) < 2:
        raise UsageError("--seed must not be negative, --train_tokens and --val_tokens must be at least 2")
    if isinstance(options.get("length"), str):
        try:
            low, _, high = options["length"].partition("-")
            options["length"] = int(low), int(high or low)
        except ValueError:
            raise UsageError(f"--length is like 32 or 8-64, not {options['length']!r}") from None
    return options


def write_generated(folder, name, seed, n_tokens, options):
    """Generate the two splits, each from its own random stream; returns their part of the meta."""
    for stream, split in enumerate(("train", "val")):
        rng = philox(seed, stream, "generate")
        if name == "fables":
            tokens, starts = fables.generate(rng, n_tokens[stream])
            targets, vocab_size = None, fables.VOCAB_SIZE
        else:
            tokens, targets, starts, vocab_size = tasks.TASKS[name](rng, n_tokens[stream], **options)
        write_split(folder, split, [(tokens, starts)])
        if targets is not None:
            targets.tofile(folder / f"{split}_targets.bin")
    meta = {"vocab_size": vocab_size, "options": tasks.OPTIONS.get(name, {}) | options}
    if name == "fables":
        return meta | {"kind": "text", "first_token": fables.SEPARATOR, "statistics": fables.statistics()}
    return meta | {"kind": "synthetic", "first_token": None}


def finish(folder, meta):
    """Count and fingerprint what was written and write meta.json; returns the whole meta. DataError if a
    split is empty."""
    meta = {"source": [], **meta, "longest_document": 0, "counts": {}}
    seen = b""                                              # the byte values that occur
    digest = hashlib.sha256()
    for split in ("train", "val"):
        starts = np.load(folder / f"{split}_starts.npy")
        if not len(starts):
            raise DataError(f"the {split} split of {meta['name']} is empty: its source holds no document")
        paths, bin_path = sorted(folder.glob(f"{split}*")), folder / f"{split}.bin"
        for path in paths:
            for chunk in chunks(path, packed=False):
                digest.update(chunk)
                if path == bin_path:
                    seen += bytes(set(chunk.translate(None, seen)))     # set() of the new ones: it is slow
        n_tokens = bin_path.stat().st_size
        lengths = np.diff(starts, append=np.uint64(documents_end(n_tokens, meta)))
        meta["longest_document"] = max(meta["longest_document"], int(lengths.max()))
        size = sum(path.stat().st_size for path in paths)
        meta["counts"][split] = {"tokens": n_tokens, "documents": len(starts), "bytes": size}
        if split == "train" and meta["kind"] == "image":        # the likeliest first pixel
            first = np.memmap(bin_path, np.uint8, mode="r")[starts]
            meta["first_token"] = int(np.bincount(first).argmax())
    meta["fingerprint"] = digest.hexdigest()
    if meta["kind"] == "text":
        meta["alphabet"] = sorted(seen)
    write_atomically(folder / "meta.json", lambda path: path.write_text(json.dumps(meta, indent=1) + "\n"))
    return meta


def summary(meta, folder):
    """A table of what a data set holds."""
    in_use = f" ({len(meta['alphabet'])} in use)" if "alphabet" in meta else ""
    vocabulary = f"vocabulary {meta['vocab_size']}{in_use}"
    lines = [f"{folder}: {vocabulary}, longest document {meta['longest_document']:,} tokens",
             f"{'split':<6}{'tokens':>16}{'documents':>14}{'bytes':>16}"]
    for split, count in meta["counts"].items():
        lines.append(f"{split:<6}{count['tokens']:>16,}{count['documents']:>14,}{count['bytes']:>16,}")
    if "statistics" in meta:
        floor, share, cost = (meta["statistics"][key] for key in STATISTICS)
        lines += [f"entropy {floor:.4f} nats per character: no loss can be lower",
                  f"{share:.1%} of it are facts that come back; to forget them costs {cost:.4f} nats more"]
    return "\n".join(lines)
