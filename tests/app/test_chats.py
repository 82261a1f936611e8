"""What is kept of visitors' chats."""

import pytest
from PIL import Image

from hovle.app import chats as module
from hovle.app.chats import Chats


def items(*sides: int) -> list[dict]:
    return [{"type": "image", "image": Image.new("L", (side, side))} for side in sides]


def test_the_chat_that_was_not_used_for_longest_makes_room(monkeypatch):
    monkeypatch.setattr(module, "MAX_CHATS", 2)
    chats = Chats("model")
    first = chats.of("a")
    chats.of("b")
    assert chats.of("a") is first
    chats.of("c")
    assert chats.of("a") is first
    with pytest.raises(ValueError, match=r"forgotten.*New chat"):
        chats.of("b")
    chats.begin("b")
    assert chats.of("b").messages == []


def test_pictures_of_all_chats_together_stay_within_a_bound(monkeypatch):
    monkeypatch.setattr(module, "MAX_PIXELS", 250)
    chats = Chats("model")
    oldest = chats.add("a", items(10), ["a.png"])
    chats.add("b", items(10), ["b.png"])
    chats.add("c", items(10), ["c.png"])
    assert oldest.is_stopped
    with pytest.raises(ValueError, match="forgotten"):
        chats.of("a")
    assert chats.of("b").names == ["b.png"]
    with pytest.raises(ValueError, match="would hold 2 pictures with 0 megapixels; at most"):
        chats.add("c", items(16), ["big.png"])
    assert chats.of("c").names == ["c.png"]


def test_the_number_of_a_chats_pictures_is_bounded(monkeypatch):
    monkeypatch.setattr(module, "MAX_PICTURES", 2)
    chats = Chats("model")
    chats.add("a", items(1, 1), ["1", "2"])
    with pytest.raises(ValueError, match="would hold 3 pictures"):
        chats.add("a", items(1), ["3"])


def test_a_page_that_was_away_is_told_so_and_its_answer_ends():
    chats = Chats("model")
    chat = chats.of("a")
    chats.forget("a")
    assert chat.is_stopped
    with pytest.raises(ValueError, match="its page was away"):
        chats.of("a")
    chats.forget("nobody")
    chats.stop("nobody")


def test_visitors_who_were_forgotten_are_not_remembered_for_ever(monkeypatch):
    monkeypatch.setattr(module, "MAX_FORGOTTEN", 1)
    chats = Chats("model")
    for visitor in ("a", "b"):
        chats.of(visitor)
        chats.forget(visitor)
    assert chats.of("a").messages == []
    with pytest.raises(ValueError, match="forgotten"):
        chats.of("b")
