"""Pictures as people have them, made here by Pillow."""

import io

import numpy as np
import pytest
from PIL import Image

from vit_jax.data.decode import decode, jpeg_size
from vit_jax.errors import DataError

H, W = 13, 20


def smooth():
    """[H, W, 3]: slopes that JPEG keeps to a few levels."""
    y, x = np.mgrid[:H, :W]
    return np.stack([x * 10, y * 15, 255 - x * 5 - y * 5], -1).astype(np.uint8)


def encoded(picture, suffix="png", **options):
    file = io.BytesIO()
    picture.save(file, suffix, **options)
    return file.getvalue()


def exif(orientation):
    tags = Image.Exif()
    tags[0x0112] = orientation
    return tags


@pytest.mark.parametrize("suffix", ["png", "bmp", "tiff", "ppm", "webp"])
def test_lossless_formats_come_back_exactly(suffix):
    options = {"lossless": True} if suffix == "webp" else {}
    got = decode(encoded(Image.fromarray(smooth()), suffix, **options))
    assert got.dtype == np.uint8
    np.testing.assert_array_equal(got, smooth())


@pytest.mark.parametrize("suffix", ["jpeg", "avif"])
def test_lossy_formats_come_back_closely(suffix):
    got = decode(encoded(Image.fromarray(smooth()), suffix, quality=95))
    assert np.abs(got.astype(int) - smooth()).mean() < 4


def test_an_ordinary_jpeg_is_what_pillow_makes_of_it():
    data = encoded(Image.fromarray(smooth()), "jpeg")
    np.testing.assert_array_equal(decode(data), np.asarray(Image.open(io.BytesIO(data))))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", ["jpeg", "png", "webp", "tiff"])
def test_the_picture_stands_upright(suffix, orientation):
    lying = Image.fromarray(smooth())
    # How a camera held that way would store it: the inverse of what the tag asks for.
    turns = [None, None, 0, 3, 1, 5, 2, 6, 4][orientation]  # PIL.Image.Transpose
    stored = lying if turns is None else lying.transpose(Image.Transpose(turns))
    options = {"lossless": True} if suffix == "webp" else {}
    got = decode(encoded(stored, suffix, exif=exif(orientation), **options))
    assert got.shape == (H, W, 3)
    assert np.abs(got.astype(int) - smooth()).max() < (40 if suffix == "jpeg" else 1)


def test_a_damaged_exif_block_loses_no_picture():
    data = encoded(Image.fromarray(smooth()), "jpeg", exif=b"Exif\0\0II*\0\xff\xff\xff\xff")
    assert decode(data).shape == (H, W, 3)


def test_grey_becomes_three_equal_channels():
    grey = smooth()[..., 0]
    for suffix in ("png", "jpeg", "pgm"):
        got = decode(encoded(Image.fromarray(grey), "ppm" if suffix == "pgm" else suffix))
        assert (got == got[..., :1]).all()
        assert np.abs(got[..., 0].astype(int) - grey).max() < 5


def test_a_palette_is_looked_up():
    colours = np.array([[200, 10, 30], [5, 250, 60]], np.uint8)
    places = (np.arange(H * W).reshape(H, W) % 2).astype(np.uint8)
    picture = Image.fromarray(places, "L").convert("P")
    picture.putpalette(colours.tobytes())
    picture.putdata(places.ravel().tolist())
    np.testing.assert_array_equal(decode(encoded(picture)), colours[places])
    # The second colour is transparent: white shows.
    got = decode(encoded(picture, transparency=1))
    np.testing.assert_array_equal(got, np.array([[200, 10, 30], [255] * 3])[places])


def test_what_is_transparent_lies_on_white():
    rgba = np.zeros((2, 3, 4), np.uint8)
    rgba[..., 0] = 100
    rgba[..., 3] = [[0, 255, 128]] * 2
    got = decode(encoded(Image.fromarray(rgba)))
    np.testing.assert_array_equal(got[0, 0], [255, 255, 255])
    np.testing.assert_array_equal(got[0, 1], [100, 0, 0])
    np.testing.assert_allclose(got[0, 2], [177, 127, 127], atol=1)  # half way
    la = encoded(Image.fromarray(rgba[..., [0, 3]]))
    np.testing.assert_array_equal(decode(la)[0, :2], [[255] * 3, [100] * 3])


def test_cmyk_has_its_colours():
    data = encoded(Image.fromarray(smooth()).convert("CMYK"), "jpeg", quality=95)
    assert np.abs(decode(data).astype(int) - smooth()).mean() < 8


def test_sixteen_bits_are_scaled_not_clipped():
    wide = np.linspace(0, 65535, H * W).reshape(H, W).astype(np.uint16)
    for suffix in ("png", "tiff", "ppm"):
        got = decode(encoded(Image.fromarray(wide), suffix))
        np.testing.assert_array_equal(got[..., 1], wide >> 8)


def test_one_pixel_and_one_bit_are_pictures():
    assert decode(encoded(Image.new("RGB", (1, 1), (1, 2, 3)))).tolist() == [[[1, 2, 3]]]
    assert decode(encoded(Image.new("1", (3, 2), 1))).tolist() == [[[255] * 3] * 3] * 2


def test_of_an_animation_the_first_frame_is_taken():
    frames = [Image.new("RGB", (W, H), colour) for colour in ("red", "blue")]
    data = encoded(frames[0], "gif", save_all=True, append_images=frames[1:])
    np.testing.assert_array_equal(decode(data), np.broadcast_to([255, 0, 0], (H, W, 3)))


@pytest.mark.parametrize("suffix", ["png", "jpeg", "webp", "gif", "bmp"])
def test_a_huge_picture_is_refused_by_its_header(suffix):
    data = encoded(Image.new("RGB", (400, 300)), suffix)
    assert decode(data, max_pixels=400 * 300).shape == (300, 400, 3)
    # The header is enough: the rest is gone, and it is still the size that is named.
    with pytest.raises(DataError, match=r"400 x 300 are 120,000 pixels, more than .*=119,999"):
        decode(data[: len(data) // 2 + 600], max_pixels=119_999)


def test_a_picture_beyond_pillows_own_limit_is_left_to_max_pixels():
    data = encoded(Image.new("1", (20_000, 10_000)))
    with pytest.raises(DataError, match="200,000,000 pixels"):
        decode(data)


@pytest.mark.parametrize(("orientation", "size"), [(1, (83, 117)), (3, (80, 120)), (6, (80, 120))])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_a_jpeg_can_be_decoded_to_fewer_pixels(orientation, size, mode):
    y, x = np.mgrid[: size[0], : size[1]]
    large = np.stack([x * 2, y * 3, 255 - x - y], -1).astype(np.uint8)
    picture = Image.fromarray(large).convert(mode)
    data = encoded(picture, "jpeg", quality=95, subsampling=0, exif=exif(orientation))
    whole = decode(data)
    assert jpeg_size(data) == whole.shape[:2] == (size[::-1] if orientation == 6 else size)
    for reduced in (2, 4, 8):
        got = decode(data, reduced=reduced)
        height, width = (-(-side // reduced) for side in whole.shape[:2])
        assert got.shape == (height, width, 3)
        rows, columns = whole.shape[0] // reduced, whole.shape[1] // reduced
        full = whole[: rows * reduced, : columns * reduced].astype(float)
        means = full.reshape(rows, reduced, columns, reduced, 3).mean((1, 3))
        np.testing.assert_allclose(got[:rows, :columns], means, atol=2)


@pytest.mark.parametrize("subsampling", [0, 1, 2])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_the_upper_rows_of_a_jpeg_are_those_of_all_of_it(mode, subsampling, capfd):
    noise = np.random.default_rng(0).integers(0, 256, (153, 77, 3), np.uint8)
    picture = Image.fromarray(noise).convert(mode)
    options = {"quality": 80, "subsampling": subsampling}
    cut = {
        "baseline": encoded(picture, "jpeg", **options),
        "mirrored": encoded(picture, "jpeg", exif=exif(2), **options),
        "followed": encoded(picture, "jpeg", **options) * 2,
    }
    whole = {
        "turned": encoded(picture, "jpeg", exif=exif(6), **options),
        "upside down": encoded(picture, "jpeg", exif=exif(3), **options),
        "progressive": encoded(picture, "jpeg", progressive=True, **options),
        "restarting": encoded(picture, "jpeg", restart_marker_rows=1, **options),
        "png": encoded(picture),
    }
    for name, data in (cut | whole).items():
        for reduced in (1, 2, 4, 8):
            expected = decode(data, reduced=reduced)
            for rows in (1, 16, 37, 90, 150, 153):
                got = decode(data, reduced=reduced, rows=rows)
                wanted = -(-rows // reduced)
                np.testing.assert_array_equal(got[:wanted], expected[:wanted], name)
                if name in whole or rows > 120:
                    np.testing.assert_array_equal(got, expected, name)
                elif rows < 90:
                    assert wanted <= len(got) < len(expected)
    assert capfd.readouterr() == ("", "")


def test_a_damaged_jpeg_keeps_what_is_left_of_it_with_fewer_rows_as_well():
    noise = np.random.default_rng(0).integers(0, 256, (120, 77, 3), np.uint8)
    data = encoded(Image.fromarray(noise), "jpeg")
    short = data[: len(data) // 3] + data[-2:]  # with an end, but of a third of its rows
    expected = decode(short)
    for rows in (30, 60, 90):
        got = decode(short, rows=rows)
        assert len(got) >= rows
        np.testing.assert_array_equal(got[:30], expected[:30])
        np.testing.assert_array_equal(got, decode(short, rows=rows))


def test_only_an_ordinary_jpeg_tells_its_size_and_is_reduced():
    picture = Image.fromarray(smooth())
    jpeg = encoded(picture, "jpeg")
    for data in (encoded(picture), encoded(picture.convert("CMYK"), "jpeg"), jpeg[:-20], b"text"):
        assert jpeg_size(data) is None
    assert decode(encoded(picture), reduced=4).shape == (H, W, 3)
    assert decode(encoded(picture.convert("CMYK"), "jpeg"), reduced=4).shape == (H, W, 3)
    with pytest.raises(DataError, match="more than max_pixels"):
        decode(jpeg, reduced=8, max_pixels=H * W - 1)


def test_every_truncated_picture_is_an_error(capfd):
    big = np.random.default_rng(0).integers(0, 256, (40, 56, 3), np.uint8)
    for suffix in ("jpeg", "png", "webp", "gif", "bmp", "tiff"):
        data = encoded(Image.fromarray(big), suffix)
        for share in (0.02, 0.3, 0.6, 0.9):
            for reduced in (1, 2):
                with pytest.raises(DataError):
                    decode(data[: int(share * len(data))], reduced=reduced)
    assert capfd.readouterr() == ("", "")  # libraries are silent too


def test_what_is_no_picture_is_named():
    wrong = {
        b"": "the file is empty",
        b"hello, I am text": "starts with 'hello, I am text'",
        b"\x00\x01\x02\xff": "starts with 00 01 02 ff",
        b"\0\0\0\x18ftypheic": "HEIC picture: convert it",
        b"%PDF-1.7": "a PDF",
        b"<svg>": "SVG",
        b"\xff\xd8\xff": "3 bytes",
        b"\x89PNG\r\n\x1a\n": "8 bytes",
    }
    for data, text in wrong.items():
        with pytest.raises(DataError, match=text):
            decode(data)


def test_a_picture_of_floats_is_refused():
    with pytest.raises(DataError, match="floating-point"):
        decode(encoded(Image.fromarray(np.zeros((2, 3), np.float32)), "tiff"))


def test_flipped_bytes_raise_nothing_but_data_errors():
    rng = np.random.default_rng(1)
    for suffix in ("jpeg", "png", "gif", "webp", "tiff", "bmp"):
        data = encoded(Image.fromarray(smooth()), suffix)
        for _ in range(40):
            damaged = bytearray(data)
            for place in rng.integers(len(data), size=3):
                damaged[place] = rng.integers(256)
            try:
                got = decode(bytes(damaged), max_pixels=10**6)
            except DataError:
                continue
            assert got.ndim == 3
