"""Pictures: read them from files, and turn them into tokens and back."""
from pathlib import Path

import numpy as np

from lib.checkpoints import write_atomically
from lib.cli import DataError, UsageError

PICTURES = {".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp"}
SIDE = 64                # of a sketch, in pixels
LIGHT = 200        # light is from this grey on, so that a thin stroke that the resizing made faint stays dark


def open_picture(path):
    """A picture file as a Pillow image with transparency; DataError if it is none."""
    try:
        from PIL import Image
    except ImportError:
        raise DataError("pictures are read with Pillow: pip install pillow") from None
    try:
        with Image.open(path) as file:
            file.seek(0)
            return file.convert("RGBA")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise DataError(f"{path} cannot be read as a picture: {error}") from None


def read_grey(path):
    """A picture file as grey levels (H, W) uint8."""
    return np.asarray(open_picture(path).convert("L"))


def read_sketch(path):
    """A picture file as 64 x 64 grey levels: transparent is white, and white beside makes it square."""
    from PIL import Image
    picture = open_picture(path)
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
        raise UsageError(f"{path} has {image.shape[0]} x {image.shape[1]} pixels, a picture of {meta['name']} {height} x {width}")
    return image_to_tokens(image, meta)


def save_grid(images, columns, path):
    """Write images (H, W) 0..255 as a PNG, `columns` in a line, with a border of two grey pixels."""
    from PIL import Image
    height, width = images[0].shape
    lines = -(-len(images) // columns)
    grid = np.full((2 + lines * (height + 2), 2 + columns * (width + 2)), 96, np.uint8)
    for i, image in enumerate(images):
        top, left = 2 + i // columns * (height + 2), 2 + i % columns * (width + 2)
        grid[top:top + height, left:left + width] = image
    write_atomically(path, lambda temporary: Image.fromarray(grid).save(temporary, format="PNG"))
