"""Synthetic sketches."""
import numpy as np
from conftest import call
from PIL import Image

import data
from experiments import sketches
from sources.prepare import prepare


def test_sketches_of_three_classes_become_a_data_set_and_an_old_folder_is_left_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(sketches, "COUNT", 12)
    folder = tmp_path / "drawn"
    assert call(sketches, folder).status == 0
    paths = sorted(folder.rglob("*.png"))
    assert len(paths) == 12 and {path.parent.name for path in paths} == {"face", "fish", "house"}
    pictures = [np.asarray(Image.open(path)) for path in paths]
    assert len({picture.tobytes() for picture in pictures}) == 12
    assert all(0.005 < (picture == 0).mean() < 0.2 for picture in pictures)
    prepare("sketchy", tmp_path / "data", folder)
    counts = data.load("sketchy", tmp_path / "data").meta["counts"]
    assert sum(part["documents"] for part in counts.values()) == 12

    before = [path.read_bytes() for path in paths]
    result = call(sketches, folder)
    assert result.status == 2 and len(result.err.splitlines()) == 1
    assert [path.read_bytes() for path in paths] == before
