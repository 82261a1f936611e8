"""What the page asks for, without a browser."""

import itertools

import pytest
import torch

from hovle.app.desk import Desk
from hovle.app.models import Models
from hovle.chat import Conversation
from hovle.eval.analyses.attention_reading import read_attention
from hovle.eval.analyses.model_under_test import ModelUnderTest
from hovle.model.pictures import load_picture


def ask(desk: Desk, question: str, visitor: str = "a") -> str:
    """The whole answer."""
    return list(desk.ask(visitor, question))[-1]


def test_the_answer_grows_and_is_that_of_a_conversation(desk, folders, pictures):
    assert desk.add_pictures("a", pictures) == []
    grown = list(desk.ask("a", "what differs?"))
    assert all(later.startswith(earlier) for earlier, later in itertools.pairwise(grown))
    conversation = Conversation(folders[0], max_new_tokens=6, images=pictures)
    assert grown[-1].strip() == conversation.answer("what differs?")
    assert desk.chats.of("a").stopped_by == "max_new_tokens (6 tokens)"


def test_a_broken_picture_is_named_and_the_others_are_taken(desk, pictures, broken):
    text = broken.with_name("text.png")
    text.write_text("no picture")
    faults = desk.add_pictures("a", [pictures[0], broken, text, pictures[1]])
    assert [fault.partition(":")[0] for fault in faults] == ["broken.png", "text.png"]
    assert not [fault for fault in faults if str(broken.parent) in fault]  # no business of the visitor's
    assert desk.chats.of("a").names == ["wide.png", "small.jpg"]


def test_each_picture_is_drawn_as_it_is_cut(desk, pictures):
    assert desk.draw_tiles("a") == []
    desk.add_pictures("a", pictures)
    ask(desk, "what?")
    drawings = desk.draw_tiles("a")
    assert [caption for _, caption in drawings] == ["wide.png: 18 tokens", "small.jpg: 6 tokens"]
    assert all(drawing.width > 900 for drawing, _ in drawings)


def test_pictures_share_the_budget_of_tokens(folders, pictures):
    desk = Desk(Models(folders[:1], max_image_tokens=18))
    desk.add_pictures("a", pictures[:1])
    desk.add_pictures("a", pictures[1:])
    assert [caption for _, caption in desk.draw_tiles("a")] == ["wide.png: 6 tokens", "small.jpg: 6 tokens"]
    with pytest.raises(ValueError, match=r"max_image_tokens \(18\) is too small"):
        desk.add_pictures("a", pictures)
    assert len(desk.chats.of("a").pictures) == 2


def test_a_later_turn_reads_no_picture_anew(desk, folders, pictures):
    desk.add_pictures("a", pictures)
    ask(desk, "what differs?")
    ask(desk, "and now?")
    assert desk.models.conversation(folders[0]).prefixes.num_reused > 24  # what both pictures take
    assert [message["role"] for message in desk.chats.of("a").messages] == ["user", "assistant"] * 2


def test_visitors_have_chats_of_their_own(desk, pictures):
    desk.add_pictures("a", pictures)
    ask(desk, "what?")
    ask(desk, "what?", "b")
    assert (len(desk.chats.of("a").pictures), len(desk.chats.of("b").pictures)) == (2, 0)
    assert len(desk.chats.of("b").messages) == 2


def test_stop_ends_an_answer_and_keeps_what_came(folders):
    desk = Desk(Models(folders[:1], max_new_tokens=900))
    answer = desk.ask("a", "what?")
    next(answer)
    desk.chats.stop("a")
    list(answer)
    chat = desk.chats.of("a")
    assert chat.stopped_by == "your stop"
    assert 0 < len(chat.answer_ids) < 900
    assert len(chat.messages) == 2


def test_pictures_that_come_during_an_answer_wait_for_the_next_question(desk, pictures):
    desk.add_pictures("a", pictures[:1])
    answer = desk.ask("a", "what?")
    next(answer)
    desk.add_pictures("a", pictures[1:])
    list(answer)
    chat = desk.chats.of("a")
    assert len(chat.waiting) == 1
    assert chat.names == ["wide.png", "small.jpg"]


def test_another_model_begins_a_new_chat_with_the_same_pictures(desk, folders, pictures):
    desk.add_pictures("a", pictures)
    ask(desk, "what?")
    desk.choose("a", folders[1])
    chat = desk.chats.of("a")
    assert (chat.messages, len(chat.waiting), chat.names) == ([], 2, ["wide.png", "small.jpg"])
    conversation = Conversation(folders[1], max_new_tokens=6, images=pictures)
    assert ask(desk, "what?").strip() == conversation.answer("what?")
    with pytest.raises(ValueError, match="not offered"):
        desk.choose("a", "third")
    desk.begin("a")
    assert (desk.chats.of("a").model, desk.chats.of("a").pictures) == (folders[1], [])


@pytest.mark.parametrize(
    ("question", "reason"), [(" ", "Write a question"), ("fox " * 2000, "positions")], ids=["none", "long"]
)
def test_a_question_that_cannot_be_asked_leaves_the_chat_as_it_was(desk, pictures, question, reason):
    desk.add_pictures("a", pictures)
    with pytest.raises(ValueError, match=reason):
        ask(desk, question)
    assert (desk.chats.of("a").messages, len(desk.chats.of("a").waiting)) == ([], 2)


KINDS = {"hovle": {}, "hd": {"pixel_shuffle_loc": "post"}, "flat": {"num_embedding_layers": 0}}


@pytest.mark.parametrize("kind", KINDS)
def test_tokens_look_where_the_analysis_says(save_model, pictures, kind):
    folder = save_model(kind, **KINDS[kind])
    desk = Desk(Models([folder], max_new_tokens=4))
    desk.add_pictures("a", pictures[:1])
    ask(desk, "what?")
    desk.add_pictures("a", pictures[1:])  # waits: nothing looked at it
    sections, tokens = desk.look("a")
    tested = ModelUnderTest(folder)
    prompt = tested.prepare(load_picture(pictures[0]), "what?")
    reading = read_attention(tested, prompt, torch.tensor(desk.chats.of("a").answer_ids))
    assert [token for token, _ in tokens] == reading.tokens
    assert sections == [section.name for section, _ in reading.layers]
    found = desk.chats.of("a").look
    for section, layers in reading.layers:
        masses = desk.masses("a", section.name)
        for place, (body, thumbnail) in enumerate(reading.mean_map(section, layers)):
            [(our_body, our_thumbnail)] = found.over_pictures(section.name, place)
            torch.testing.assert_close(our_body, body)
            torch.testing.assert_close(our_thumbnail, thumbnail)
            assert masses[place][1] == pytest.approx(float(body.sum() + thumbnail.sum()), abs=1e-5)


def test_a_tokens_look_is_drawn_over_every_picture_and_thumbnail(desk, pictures):
    desk.add_pictures("a", pictures)
    ask(desk, "what differs?")
    ask(desk, "and now?")
    sections, tokens = desk.look("a")
    drawn = desk.draw_look("a", sections[0], 1)
    assert [caption.partition(":")[0] for _, caption in drawn] == ["wide.png", "wide.png, thumbnail", "small.jpg"]
    shares = [float(caption.rpartition(" ")[2].rstrip("%")) / 100 for _, caption in drawn]
    assert sum(shares) == pytest.approx(desk.masses("a", sections[0])[1][1], abs=0.002)
    assert [drawing.size for drawing, _ in drawn] == [(640, 226), (640, 226), (640, 640)]
    with pytest.raises(ValueError, match=f"has {len(tokens)} tokens"):
        desk.draw_look("a", sections[0], len(tokens))
    with pytest.raises(ValueError, match="no section"):
        desk.masses("a", "elsewhere")


def test_a_look_needs_an_answer_about_a_picture_and_ends_with_the_next(desk, pictures):
    with pytest.raises(ValueError, match="no answer yet"):
        desk.look("a")
    ask(desk, "what?")
    with pytest.raises(ValueError, match="shows no picture"):
        desk.look("a")
    desk.add_pictures("a", pictures)
    ask(desk, "and now?")
    sections, _ = desk.look("a")
    ask(desk, "and then?")
    with pytest.raises(ValueError, match="not read yet"):
        desk.draw_look("a", sections[0], 0)
