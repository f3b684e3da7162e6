"""Draw synthetic sketches, for where there are no real ones: faces, houses and fish, each stroke with jitter.

    python -m experiments.sketches data/drawn           # 2,000 PNG files in three folders
    python data.py --dataset=sketchy --source=data/drawn
"""
import sys
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from lib.cli import UsageError, run_main

COUNT, SIDE, LINE = 2000, 256, 6        # sketches; pixels of a side and of a line's width


def arc(x, y, radius, begin=0.0, end=1.0, flat=1.0):
    """Points (16, 2) of an arc round (x, y); begin and end in turns, clockwise from the right."""
    angle = 2 * np.pi * np.linspace(begin, end, 16)
    return np.stack([x + radius * np.cos(angle), y + flat * radius * np.sin(angle)], axis=1)


def line(*points):
    """Points (n, 2) of a polyline, given as x, y, x, y, ..."""
    return np.array(points, dtype=float).reshape(-1, 2)


SKETCHES = {                            # the strokes of each class, from -1 to 1, y downwards
    "face": [arc(0, 0, 0.8), arc(-0.3, -0.25, 0.1), arc(0.3, -0.25, 0.1), arc(0, 0.1, 0.4, 0.05, 0.45)],
    "house": [line(-0.6, 0, -0.6, 0.8, 0.6, 0.8, 0.6, 0, -0.6, 0), line(-0.75, 0, 0, -0.7, 0.75, 0),
              line(-0.15, 0.8, -0.15, 0.35, 0.15, 0.35, 0.15, 0.8)],
    "fish": [arc(-0.1, 0, 0.6, flat=0.5), arc(-0.4, -0.08, 0.06),
             line(0.5, 0, 0.85, -0.35, 0.85, 0.35, 0.5, 0)],
}


def draw(strokes, rng):
    """A picture of strokes, stretched, turned, moved, and each point of them jittered."""
    turn, stretch, move = rng.normal(0, 0.12), rng.normal(0.8, 0.08, 2), rng.normal(0, 0.06, 2)
    rotation = np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]])
    image = Image.new("L", (SIDE, SIDE), 255)
    for stroke in strokes:
        jitter = rng.normal(0, 0.02, stroke.shape) + rng.normal(0, 0.02, 2)
        points = (stroke + jitter) * stretch @ rotation + move
        pixels = [tuple(point) for point in (points + 1) * SIDE / 2]
        ImageDraw.Draw(image).line(pixels, fill=0, width=LINE, joint="curve")
    return image


def main():
    if len(sys.argv) != 2 or sys.argv[1].startswith("-"):
        raise UsageError("one folder is wanted, for the sketches")
    if Path(sys.argv[1]).exists():
        raise UsageError(f"{sys.argv[1]} is there already: sketches go into a new folder")
    rng, names = np.random.default_rng(0), list(SKETCHES)
    for i in range(COUNT):
        name = names[i % len(names)]
        folder = Path(sys.argv[1]) / name
        folder.mkdir(parents=True, exist_ok=True)
        draw(SKETCHES[name], rng).save(folder / f"{i:04}.png")


if __name__ == "__main__":
    run_main(main)
