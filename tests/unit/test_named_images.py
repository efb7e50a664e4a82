# SPDX-License-Identifier: Apache-2.0
"""Images that API keys name: apart, the last one of each name, and within a number of bytes."""

from __future__ import annotations

from contextlib import suppress

import pytest
from himap_server.errors import GatewayError
from himap_server.named_images import NamedImages
from himap_server.security.images import CheckedImage
from himap_server.security.keys import Key

ANN, BOB = (Key(name=name, sha256=letter * 64) for name, letter in (("ann", "a"), ("bob", "b")))


ROOM = 1028  # of an entry with a name of one character


def image(size: int, letter: bytes = b"x") -> CheckedImage:
    return CheckedImage("png", 8, 8, letter * size)


def has(images: NamedImages, key: Key | None, name: str) -> bool:
    with suppress(GatewayError):
        return bool(images.find(key, name, "messages[0]"))
    return False


def test_names_of_a_key_are_its_own() -> None:
    images = NamedImages(10_000)
    images.remember(ANN, "a", image(10))
    assert has(images, ANN, "a")
    assert not has(images, BOB, "a")
    # A key that is removed leaves its name, and nothing else, to the next one.
    assert not has(images, Key(name="ann", sha256="c" * 64), "a")
    images.remember(BOB, "a", image(10, b"y"))
    assert images.find(ANN, "a", "").data == b"x" * 10
    assert images.find(BOB, "a", "").data == b"y" * 10


def test_those_used_last_stay() -> None:
    images = NamedImages(3 * ROOM + 30)
    for name in "abc":
        images.remember(ANN, name, image(10))
    assert has(images, ANN, "a")
    images.remember(ANN, "d", image(10))
    assert [name for name in "abcd" if has(images, ANN, name)] == ["a", "c", "d"]
    images.remember(ANN, "a", image(15))  # counts once
    assert [name for name in "acd" if has(images, ANN, name)] == ["a", "d"]


def test_many_small_images_have_a_bound_too() -> None:
    images = NamedImages(100_000)
    names = [f"{number:0256}" for number in range(1000)]
    for name in names:
        images.remember(ANN, name, image(24))
    kept = sum(has(images, ANN, name) for name in names)
    assert 0 < kept * (24 + 4 * 256) < 100_000


def test_an_image_too_large_to_keep_takes_its_name_along() -> None:
    """Otherwise the name would be an image that the client has replaced."""
    images = NamedImages(2 * ROOM + 30)
    images.remember(ANN, "a", image(10))
    images.remember(ANN, "b", image(10))
    images.remember(ANN, "a", image(2 * ROOM))
    assert not has(images, ANN, "a")
    assert has(images, ANN, "b")


@pytest.mark.parametrize(("max_bytes", "key"), [(0, ANN), (100, None)])
def test_servers_that_keep_none_say_why(max_bytes: int, key: Key | None) -> None:
    images = NamedImages(max_bytes)
    images.remember(key, "a", image(1))
    why = "max-named-image-bytes" if key else "no API keys"
    with pytest.raises(GatewayError, match=why) as error:
        images.find(key, "a", "messages[0]")
    assert (error.value.status_code, error.value.param) == (400, "messages[0].uuid")
