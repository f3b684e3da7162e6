"""Files that are not what one hopes: texts in other encodings, without paragraphs, pictures of all kinds."""
import numpy as np
import pytest
from PIL import Image

from lib.cli import DataError
from sources import pictures, texts

STORIES = "Once upon a time.\nThe end.\n<|endoftext|>\n“Hi” – café\n<|endoftext|>\n"


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
def test_stories_are_read_in_the_encoding_of_their_mark(tmp_path, encoding):
    path = tmp_path / "stories.txt"
    path.write_text(STORIES, encoding=encoding)
    tokens = b"".join(piece for piece, _ in texts.stories(path))
    assert tokens == b"\0Once upon a time.\nThe end.\0\"Hi\" - caf\0"


def test_utf_16_without_a_mark_is_refused(tmp_path):
    path = tmp_path / "stories.txt"
    path.write_bytes(STORIES.encode("utf-16-le"))
    with pytest.raises(DataError, match="character 0"):
        list(texts.stories(path))


def test_a_text_with_a_mark_becomes_utf_8_without_one(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("é\n" * 200, encoding="utf-16")
    texts.write_text(tmp_path, path)
    content = (tmp_path / "train.bin").read_bytes() + (tmp_path / "val.bin").read_bytes()[1:]
    assert content == b"\n" + ("é\n" * 200).encode()


@pytest.mark.parametrize(("text", "kind"), [("a b\n\n" * 1000, "paragraphs"), ("a b\n" * 1000, "lines"),
                                            ("a b " * 1000, "cuts")])
def test_a_text_has_many_documents_whatever_separates_them(tmp_path, text, kind):
    path = tmp_path / "text"
    path.write_text("\n" + text)
    starts, what = texts.documents(path)
    assert kind in what and len(starts) >= texts.FEW and starts[0] == 0
    assert (np.diff(starts.astype(int)) > 0).all()


def test_newlines_are_found_across_the_parts_of_a_file(tmp_path, monkeypatch):
    path, text = tmp_path / "text", "\nab\n\ncd\n\n\nef\r\n\r\ngh\n"
    path.write_bytes(text.encode())
    expected = [0] + [i for i in range(2, len(text) - 1) if text[i] == "\n" and text[i + 1] not in "\r\n"
                      and (text[i - 1] == "\n" or text[i - 2:i] == "\n\r")]
    for size in 1, 2, 3, 5, 100:
        monkeypatch.setattr(texts, "CHUNK", size)
        monkeypatch.setattr(texts, "chunks", lambda path, packed, size=size: (
            text.encode()[i:i + size] for i in range(0, len(text), size)))
        assert texts.newlines(path, after_blank=True).tolist() == expected


def ink(bits):
    """A drawing of dark ink on white, 40 x 40, with 8 or 16 bits a pixel."""
    levels = np.full((40, 40), 255)
    levels[10:30, 18:22] = 40
    return Image.fromarray(levels.astype(np.uint8) if bits == 8 else (levels * 257).astype(np.uint16))


def test_a_picture_of_16_bits_is_that_of_8(tmp_path):
    for bits in 8, 16:
        ink(bits).save(tmp_path / f"{bits}.png")
    eight, sixteen = (pictures.read_sketch(tmp_path / f"{bits}.png") for bits in (8, 16))
    assert (eight == sixteen).all() and (eight < 128).any()


def test_a_picture_is_turned_as_its_camera_says(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("L", (30, 20), 255).save(tmp_path / "turned.jpg", exif=exif)
    assert pictures.open_picture(tmp_path / "turned.jpg").size == (20, 30)


def test_a_picture_of_too_many_pixels_is_not_decoded(tmp_path):
    Image.new("1", (pictures.MOST_SIDE + 1, 1)).save(tmp_path / "long.png")
    with pytest.raises(DataError, match="too many"):
        pictures.open_picture(tmp_path / "long.png")


def test_hidden_files_are_no_pictures_and_links_are_followed_once(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    for name in "a/1.png", "a/2.tif", "a/._3.png", "b/4.png":
        ink(8).save(tmp_path / name)
    (tmp_path / "a" / "loop").symlink_to(tmp_path / "a")
    (tmp_path / "a" / "other").symlink_to(tmp_path / "b")
    assert {path.name for path in pictures.find_pictures(tmp_path / "a")} == {"1.png", "2.tif", "4.png"}
