"""Pictures: read them from files, and turn them into tokens and back."""
import os
from collections import Counter
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps
from tqdm import tqdm

from lib.checkpoints import write_atomically
from lib.cli import DataError, UsageError

PICTURES = {".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff"}
SIDE = 64                # of a sketch, in pixels
LIGHT = 200              # light is from this grey on: a thin stroke that resizing made faint stays dark
MOST_SIDE, MOST_PIXELS = 20_000, 50_000_000     # of a picture file: more are not decoded
WORKING_SIDE = 1024      # a larger picture is made smaller before it becomes a square


def find_pictures(source):
    """The picture files below a folder, sorted, without hidden ones; links to folders are followed once."""
    paths, visited = [], set()
    for folder, names, files in os.walk(source, followlinks=True):
        if (real := os.path.realpath(folder)) in visited:
            names.clear()
            continue
        visited.add(real)
        names[:] = [name for name in names if not name.startswith(".")]
        paths += [Path(folder, file) for file in files if not file.startswith(".")]
    return sorted(path for path in paths if path.suffix.lower() in PICTURES and path.is_file())


def sketches(source, rng):
    """The pictures below a folder: ("train", pieces), then ("val", pieces), of a tenth of them, drawn by rng.

    A file that cannot be read is left out. A line at the end says how many, and why.
    """
    paths, skipped, n_dark = find_pictures(source), Counter(), 0
    if len(paths) < 2:
        kinds = " ".join(sorted(PICTURES))
        raise DataError(f"{source} holds {len(paths)} pictures ({kinds}): at least two are needed")
    order, n_held_out = rng.permutation(len(paths)), max(1, len(paths) // 10)

    def pieces(split, which):
        nonlocal n_dark
        for i in tqdm(which, desc=f"sketchy {split}", unit=" pictures", disable=None):
            try:
                tokens = to_patches(read_sketch(paths[i]), 2)
            except DataError as error:
                skipped[str(error)] += 1
                continue
            light = np.unpackbits(tokens[:, None], axis=1)[:, 4:].mean()
            n_dark += light == 1 or light < 0.5
            yield tokens, [0]

    for split, which in ("train", np.sort(order[n_held_out:])), ("val", np.sort(order[:n_held_out])):
        yield split, pieces(split, which)
    reasons = f", {sum(skipped.values())} skipped, for example: {next(iter(skipped))}" if skipped else ""
    print(f"{source}: {len(paths)} pictures found, {len(paths) - sum(skipped.values())} read{reasons}; "
          f"{n_dark} are blank or mostly dark")


def open_picture(path):
    """A picture file as a Pillow image with transparency, upright; DataError if it is none or too large."""
    try:
        with Image.open(path) as file:
            if max(file.size) > MOST_SIDE or file.width * file.height > MOST_PIXELS:
                raise DataError(f"{path} has {file.width} x {file.height} pixels, too many")
            file.seek(0)
            picture = ImageOps.exif_transpose(file)
            if picture.mode == "F" or picture.mode.startswith("I"):         # 16 bits or more a pixel: to 8
                levels = np.asarray(picture, np.float64)
                white = next((top for top in (1.0, 255.0) if levels.max() <= top), 65535.0)
                picture = Image.fromarray((levels / white * 255).clip(0, 255).astype(np.uint8))
            return picture.convert("RGBA")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise DataError(f"{path} cannot be read as a picture: {error}") from None


def read_grey(path):
    """A picture file as grey levels (H, W) uint8."""
    return np.asarray(open_picture(path).convert("L"))


def read_sketch(path):
    """A picture file as 64 x 64 grey levels: transparent is white, and white beside makes it square."""
    picture = open_picture(path)
    picture.thumbnail((WORKING_SIDE, WORKING_SIDE), Image.Resampling.BOX)
    canvas = Image.new("RGBA", (max(picture.size),) * 2, "white")
    canvas.alpha_composite(picture, tuple((max(picture.size) - side) // 2 for side in picture.size))
    return np.asarray(canvas.convert("L").resize((SIDE, SIDE), Image.Resampling.BOX))


def to_patches(image, patch):
    """The tokens (n,) uint8 of a picture (H, W): per patch one bit per pixel, 1 where it is light."""
    height, width = np.shape(image)
    light = (np.asarray(image) >= LIGHT).reshape(height // patch, patch, width // patch, patch).swapaxes(1, 2)
    return light.reshape(-1, patch * patch) @ (1 << np.arange(patch * patch)).astype(np.uint8)


def from_patches(tokens, height, width, patch):
    """The picture (H, W), 0 or 255, of tokens (n,): the inverse of to_patches."""
    light = np.asarray(tokens)[:, None] >> np.arange(patch * patch) & 1
    light = light.reshape(height // patch, width // patch, patch, patch).swapaxes(1, 2)
    return (255 * light).astype(np.uint8).reshape(height, width)


def tokens_to_image(tokens, meta):
    """The picture (H, W) uint8, 0..255, of one document's tokens (n,)."""
    height, width, patch = (meta["image"][key] for key in ("height", "width", "patch"))
    tokens = np.asarray(tokens)
    if patch == 1:
        return tokens.astype(np.uint8).reshape(height, width)
    return from_patches(tokens, height, width, patch)


def image_to_tokens(image, meta):
    """The tokens (n,) uint8 of a picture (H, W): the inverse of tokens_to_image."""
    patch = meta["image"]["patch"]
    return np.asarray(image, np.uint8).reshape(-1) if patch == 1 else to_patches(image, patch)


def read_picture(path, meta):
    """The tokens (n,) uint8 of a picture file, as in the data set: a sketch is resized, a digit must have its
    size already."""
    if not Path(path).is_file():
        raise UsageError(f"there is no picture {path}")
    height, width = meta["image"]["height"], meta["image"]["width"]
    image = read_sketch(path) if meta["name"] == "sketchy" else read_grey(path)
    if image.shape != (height, width):
        size = " x ".join(map(str, image.shape))
        raise UsageError(f"{path} has {size} pixels, a picture of {meta['name']} {height} x {width}")
    return image_to_tokens(image, meta)


def save_grid(images, columns, path):
    """Write images (H, W) 0..255 as a PNG, `columns` in a line, with a border of two grey pixels."""
    height, width = images[0].shape
    lines = -(-len(images) // columns)
    grid = np.full((2 + lines * (height + 2), 2 + columns * (width + 2)), 96, np.uint8)
    for i, image in enumerate(images):
        top, left = 2 + i // columns * (height + 2), 2 + i % columns * (width + 2)
        grid[top:top + height, left:left + width] = image
    write_atomically(path, lambda temporary: Image.fromarray(grid).save(temporary, format="PNG"))
