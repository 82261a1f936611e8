"""`hovle chat`."""

import json
import os
import signal
import subprocess
import sys

import pytest
import torch
from PIL import Image

from hovle import HoVLEForConditionalGeneration, HoVLEProcessor, cli
from hovle.chat.conversation import Conversation


@pytest.fixture
def model_folder(tmp_path, make_tokenizer, tiny_config):
    """A tiny model with random weights and its processor, saved."""
    torch.manual_seed(0)
    config = tiny_config()
    HoVLEForConditionalGeneration(config).save_pretrained(tmp_path / "model")
    HoVLEProcessor.from_language_model(make_tokenizer(), config, max_tiles=4).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def pictures(tmp_path):
    """Two picture files."""
    paths = [tmp_path / "a.png", tmp_path / "b.jpg"]
    for path, colour in zip(paths, ["red", "blue"], strict=True):
        Image.new("RGB", (90, 60), colour).save(path)
    return paths


def test_one_question_prints_one_answer(model_folder, pictures, capsys):
    first, second = pictures
    arguments = ["chat", "--model", str(model_folder), "--image", str(first), "--image", str(second)]
    assert cli.main([*arguments, "-q", "what differs?", "--max-new-tokens", "5"]) == 0
    conversation = Conversation(str(model_folder), max_new_tokens=5)
    conversation.add_images([str(first), str(second)])
    assert capsys.readouterr().out == conversation.answer("what differs?") + "\n"


def test_a_conversation_remembers_turns_and_pictures(model_folder, pictures):
    conversation = Conversation(str(model_folder), max_new_tokens=4)
    conversation.add_images([str(pictures[0])])
    conversation.answer("what is it?")
    conversation.answer("and now?")
    kinds = [[item["type"] for item in message["content"]] for message in conversation.messages]
    assert kinds == [["image", "text"], ["text"], ["text"], ["text"]]
    conversation.restart()
    assert conversation.messages == []


def test_a_streamed_answer_is_the_answer_and_is_kept(model_folder, pictures):
    conversation = Conversation(model_folder, max_new_tokens=6)
    conversation.add_images([pictures[0]])
    asked_twice = [conversation, conversation.another(images=conversation.images)]
    whole, pieces = asked_twice[0].answer("what is it?"), list(asked_twice[1].stream("what is it?"))
    assert "".join(pieces).strip() == whole
    for found in asked_twice:
        assert len(found.answer_ids) == 6
        assert found.stopped_by == "max_new_tokens (6 tokens)"
        assert found.messages == conversation.messages
        assert found.images == []


def test_a_stream_that_is_closed_early_is_kept_as_far_as_it_came(model_folder):
    conversation = Conversation(model_folder, max_new_tokens=900)
    pieces = conversation.stream("what is it?")
    next(pieces)
    pieces.close()
    assert 0 < len(conversation.answer_ids) < 900
    assert conversation.stopped_by is None
    said = conversation.processor.decode(conversation.answer_ids, skip_special_tokens=True).strip()
    assert conversation.messages[-1]["content"][0]["text"] == said


def test_a_stream_that_fails_leaves_question_and_pictures_unsaid(model_folder, pictures, monkeypatch):
    conversation = Conversation(model_folder)
    conversation.add_images([pictures[0]])
    monkeypatch.setattr(conversation.model, "generate", lambda **kwargs: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        list(conversation.stream("what is it?"))
    assert conversation.messages == []
    assert len(conversation.images) == 1


def test_another_conversation_goes_on_with_what_the_first_has_read(model_folder, pictures):
    first = Conversation(model_folder, max_new_tokens=3)
    first.add_images([pictures[0]])
    first.answer("what is it?")
    other = first.another(first.messages)
    other.answer("and now?")
    assert other.prefixes.num_reused > len(first.answer_ids) + 4  # a tile has 4 tokens
    assert (len(first.messages), len(other.messages)) == (2, 4)
    assert other.model is first.model


@pytest.mark.parametrize("option", ["--label-images", "--label-pictures"])
def test_pictures_can_share_a_budget_and_be_numbered(model_folder, pictures, monkeypatch, capsys, option):
    prompts = []
    monkeypatch.setattr(
        HoVLEForConditionalGeneration,
        "generate",
        lambda self, input_ids, **kwargs: prompts.append(input_ids[0].tolist()) or input_ids,
    )
    shown = [argument for path in pictures for argument in ("--image", str(path))]
    command = ["chat", "--model", str(model_folder), *shown, "-q", "what differs?"]
    processor = HoVLEProcessor.from_pretrained(model_folder)
    budget = sum(processor.spread_tiles([(60, 90)] * 2, 10**6)[1]) - 1
    assert cli.main(command) == 0
    assert cli.main([*command, "--max-image-tokens", str(budget), option]) == 0
    plain, numbered = prompts
    assert numbered.count(processor.image_token_id) + 4 <= budget < plain.count(processor.image_token_id) + 4
    for label in ("Image-1: ", "Image-2: "):
        assert label in processor.decode(numbered)
        assert label not in processor.decode(plain)
    assert cli.main([*command, "--max-image-tokens", "5"]) == 1
    assert "max_image_tokens (5) is too small" in capsys.readouterr().err


def test_a_broken_picture_does_not_end_a_conversation(model_folder, pictures, monkeypatch, capsys, tmp_path):
    (tmp_path / "broken.png").write_bytes(pictures[0].read_bytes()[:40])
    lines = iter([f"/image {tmp_path / 'broken.png'}", f"/image {pictures[0]}", "what is it?", "/new", "", "/quit"])
    monkeypatch.setattr("builtins.input", lambda prompt: next(lines))
    assert cli.main(["chat", "--model", str(model_folder), "--max-new-tokens", "3"]) == 0
    assert "broken.png" in capsys.readouterr().out
    assert next(lines, None) is None


def converse(model_folder, monkeypatch, lines: list[str], max_new_tokens: int = 1) -> Conversation:
    """Hold a conversation of these lines."""
    rest = iter(lines)
    held = []
    real = Conversation.__init__
    monkeypatch.setattr("builtins.input", lambda prompt: next(rest))
    monkeypatch.setattr(Conversation, "__init__", lambda self, *args: held.append(self) or real(self, *args))
    assert cli.main(["chat", "--model", str(model_folder), "--max-new-tokens", str(max_new_tokens)]) == 0
    return held[0]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("/image", "/image: expected a path or URL after it"),
        ("/image ''", "/image: expected a path or URL after it"),
        ("/images a.png", "/images: no command"),
        ("/quti", "/quti: no command"),
        ("what is \udcff?", "bytes that are no UTF-8"),
    ],
    ids=ascii,
)
def test_a_mistyped_line_is_no_question(model_folder, monkeypatch, capsys, line, reason):
    assert converse(model_folder, monkeypatch, [line, "/quit"]).messages == []
    assert f"! {reason}" in capsys.readouterr().out.replace("The line holds ", "")


def test_help_is_given_and_a_space_makes_a_question_of_a_command(model_folder, monkeypatch, capsys):
    held = converse(model_folder, monkeypatch, ["/help", " /quit what?", "/quit"])
    assert capsys.readouterr().out.count("/image PATH adds a picture") == 2
    assert held.messages[0]["content"][-1]["text"] == "/quit what?"


def test_paths_may_be_quoted_and_start_at_home(model_folder, pictures, monkeypatch):
    monkeypatch.setenv("HOME", str(pictures[0].parent))
    spaced = pictures[0].rename(pictures[0].with_name("a b.png"))
    lines = [f'/image "{spaced}"', f"/image '{spaced}'", f"/image {spaced}", "/image ~/a b.png", "/quit"]
    assert len(converse(model_folder, monkeypatch, lines).images) == 4


DROPPED = [
    r"{folder}/a\ b.png",
    "'{folder}/a b.png'",
    '"{folder}/a b.png"',
    "file://{folder}/a%20b.png",
    "{folder}/a b.png",
    "~/a b.png",
    "a.png",
    r"{folder}/a\ b.png a.png",
    "'{folder}/it'\\''s.png'",
]
ASKED = [r"{folder}/a\ b.png what is it?", "'{folder}/it'\\''s.png' what's it?"]


@pytest.mark.parametrize(
    "line", [*DROPPED, *(f"/image {line}" for line in DROPPED), *ASKED], ids=lambda line: line.replace("/", "|")
)
def test_a_picture_dropped_on_the_terminal_is_shown_with_the_next_question(model_folder, pictures, monkeypatch, line):
    folder = pictures[0].parent
    monkeypatch.setenv("HOME", str(folder))
    monkeypatch.chdir(folder)
    for name in ("a b.png", "it's.png"):
        (folder / name).write_bytes(pictures[0].read_bytes())
    held = converse(model_folder, monkeypatch, [line.format(folder=folder), "/quit"])
    if line in ASKED:
        (*shown, text), _ = (message["content"] for message in held.messages)
        assert [item["type"] for item in shown] == ["image"]
        assert text["text"].startswith("what")
    else:
        assert held.messages == []
        assert len(held.images) == 1 + (line.count(".png") > 1)


@pytest.mark.parametrize("line", ["a.png is a name, no?", "what is a.png?", " ./a.png", "and/or", "it's b.jpg"])
def test_a_question_that_names_a_file_stays_a_question(model_folder, monkeypatch, tmp_path, line):
    monkeypatch.chdir(tmp_path)
    held = converse(model_folder, monkeypatch, [line, "/quit"])
    assert held.messages[0]["content"] == [{"type": "text", "text": line.strip()}]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("/nowhere/gone.png", "/nowhere/gone.png: no such file"),
        ("file:///nowhere/gone%20now.png", "/nowhere/gone now.png: no such file"),
        ("file://far/gone.png", "only those of this machine"),
        ("/image my gone.png", "my gone.png: no such file"),
        ("/save", "/save: expected the name of a new file"),
        ("/save x.json", "Nothing was said yet"),
        ("x\0y.png", ""),
    ],
)
def test_a_dropped_file_that_is_not_there_is_named(model_folder, monkeypatch, capsys, line, reason):
    converse(model_folder, monkeypatch, [line, "/quit"])
    assert reason in capsys.readouterr().out


def test_bytes_of_another_encoding_do_not_end_a_conversation(model_folder):
    finished = subprocess.run(
        [sys.executable, "-m", "hovle", "chat", "--model", str(model_folder), "--max-new-tokens", "1"],
        input=b"caf\xe9?\n/help\n",
        capture_output=True,
        env={**os.environ, "PYTHONIOENCODING": "utf-8"},
        check=False,
    )
    assert finished.returncode == 0, finished.stderr[-2000:]
    assert b"no UTF-8" in finished.stdout
    assert finished.stdout.count(b"/image PATH adds a picture") == 2


def test_a_missing_picture_is_named_before_the_model_is_read(model_folder, monkeypatch, capsys):
    monkeypatch.setattr(HoVLEProcessor, "from_pretrained", lambda *_: pytest.fail("the model would be read"))
    assert cli.main(["chat", "--model", str(model_folder), "--image", "gone.png", "-q", "?"]) == 1
    assert "gone.png" in capsys.readouterr().err


def test_a_folder_without_a_processor_is_told_so(model_folder, capsys):
    (model_folder / "processor_config.json").unlink()
    assert cli.main(["chat", "--model", str(model_folder), "-q", "?"]) == 1
    assert "holds a model but no processor (preprocessor_config.json missing)" in capsys.readouterr().err


def test_the_end_of_input_ends_the_conversation(model_folder, monkeypatch):
    def end(prompt):
        raise EOFError

    monkeypatch.setattr("builtins.input", end)
    assert cli.main(["chat", "--model", str(model_folder)]) == 0


def test_a_missing_model_or_picture_is_named(model_folder, tmp_path, capsys):
    assert cli.main(["chat", "--model", str(tmp_path / "nowhere"), "-q", "?"]) == 1
    assert "nowhere" in capsys.readouterr().err
    assert cli.main(["chat", "--model", str(model_folder), "--image", str(tmp_path / "gone.png"), "-q", "?"]) == 1
    assert "gone.png" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["runs/x", "runs/demo/x", "nowhere/demo/x", "./x", "/nowhere/x", "~/x", "../x", "x"])
def test_a_missing_folder_is_named_at_once_and_no_hub_is_asked(name, tmp_path, monkeypatch, capsys):
    (tmp_path / "runs" / "demo").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(HoVLEProcessor, "from_pretrained", lambda *_, **__: pytest.fail("the Hub would be asked"))
    assert cli.main(["chat", "--model", name, "-q", "?"]) == 1
    assert f"No model in {name}, as there is no such folder: expected a folder" in capsys.readouterr().err


def narrow(folder, positions: int) -> None:
    """Leave the model of a folder so many positions."""
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["max_position_embeddings"] = positions
    (folder / "config.json").write_text(json.dumps(config))


def test_a_conversation_beyond_the_positions_of_the_model_is_refused_until_a_new_one(model_folder, pictures):
    narrow(model_folder, 40)
    conversation = Conversation(model_folder, max_new_tokens=4, images=pictures)
    with pytest.raises(ValueError, match=r"takes \d+ tokens .* has 40 positions .*/new.*--max-image-tokens"):
        conversation.answer("what is the difference between these two pictures, please?")
    assert conversation.messages == []
    conversation.restart()
    conversation.answer("hi")
    with pytest.raises(ValueError, match="has 40 positions"):
        [conversation.answer("hi") for _ in range(20)]
    assert 0 < len(conversation.messages) < 20


def test_an_answer_ends_at_the_last_position_and_says_so(model_folder, capsys):
    conversation = Conversation(model_folder, max_new_tokens=3)
    num_said = conversation.encode([{"role": "user", "content": "hi"}])["input_ids"].shape[1]
    narrow(model_folder, num_said + 5)
    assert cli.main(["chat", "--model", str(model_folder), "-q", "hi"]) == 0
    assert "cut: it reached the end of its positions (5 tokens)" in capsys.readouterr().err
    assert cli.main(["chat", "--model", str(model_folder), "-q", "hi", "--max-new-tokens", "5"]) == 0
    assert "cut: it reached max_new_tokens (5 tokens)" in capsys.readouterr().err


def test_an_answer_that_the_model_ends_is_not_called_cut(model_folder, capsys, monkeypatch):
    end = [torch.tensor([[2]])]
    monkeypatch.setattr(
        HoVLEForConditionalGeneration,
        "generate",
        lambda self, input_ids, **kwargs: torch.cat([input_ids, *end], dim=1),
    )
    assert cli.main(["chat", "--model", str(model_folder), "-q", "hi", "--max-new-tokens", "1"]) == 0
    assert "cut" not in capsys.readouterr().err


class InterruptAfter:
    """Makes the answer "aaa..." and sends the interrupt of Ctrl+C to this process when it has so many letters."""

    def __init__(self, num_tokens: int, letter_id: int):
        self.left, self.letter_id = num_tokens, letter_id

    def __call__(self, input_ids, scores):
        if not self.left:
            signal.raise_signal(signal.SIGINT)
        self.left -= 1
        scores[:, self.letter_id] = 1e4
        return scores


@pytest.mark.parametrize("num_tokens", [0, 3])
def test_an_interrupt_ends_the_answer_and_not_the_conversation(
    model_folder, pictures, monkeypatch, capsys, request, num_tokens
):
    real = HoVLEForConditionalGeneration.generate
    letter_id = HoVLEProcessor.from_pretrained(model_folder).tokenizer.convert_tokens_to_ids("a")
    processors = [None, [InterruptAfter(num_tokens, letter_id)], None]

    def generate(self, **kwargs):
        return real(self, **kwargs, logits_processor=processors.pop(0))

    monkeypatch.setattr(HoVLEForConditionalGeneration, "generate", generate)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # some test runners ignore it
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, before))
    held = converse(model_folder, monkeypatch, ["first", f"/image {pictures[0]}", "second", "third", "/quit"], 5)
    assert "! stopped; the conversation goes on" in capsys.readouterr().out
    questions = [message["content"][-1]["text"] for message in held.messages[::2]]
    assert questions == (["first", "second", "third"] if num_tokens else ["first", "third"])
    asked = held.messages[2]["content"]
    assert asked[0]["type"] == "image"  # an unanswered question leaves its picture for the next
    if num_tokens:
        assert held.messages[3]["content"][0]["text"] == "aaa"


def test_a_system_message_comes_before_every_turn(model_folder, monkeypatch):
    prompts = []
    monkeypatch.setattr(
        HoVLEForConditionalGeneration,
        "generate",
        lambda self, input_ids, **_: prompts.append(input_ids[0]) or input_ids,
    )
    conversation = Conversation(model_folder, system="Be short.")
    conversation.answer("hi")
    conversation.restart()
    conversation.answer("hi")
    texts = [conversation.processor.decode(ids) for ids in prompts]
    assert all(text.startswith("<|im_start|>system\nBe short.<|im_end|>") for text in texts)


HIDES = "{% for message in messages if message.role != 'system' %}{{ message.content }}{% endfor %}"
REFUSES = "{% if messages[0].role == 'system' %}{{ raise_exception('no system here') }}{% endif %}" + HIDES


@pytest.mark.parametrize(
    ("template", "reason"), [(HIDES, "does not show system messages"), (REFUSES, "no system here")]
)
def test_a_system_message_that_the_model_is_not_shown_is_refused(model_folder, capsys, template, reason):
    (model_folder / "chat_template.jinja").write_text(template)
    assert cli.main(["chat", "--model", str(model_folder), "--system", "Be short.", "-q", "hi"]) == 1
    assert reason in capsys.readouterr().err


def test_a_template_that_refuses_a_turn_does_not_end_the_conversation(model_folder, monkeypatch, capsys):
    template = "{% for message in messages %}{{ message.content }}{% endfor %}{% if messages|length > 1 %}"
    (model_folder / "chat_template.jinja").write_text(template + "{{ raise_exception('one turn only') }}{% endif %}")
    held = converse(model_folder, monkeypatch, ["hi", "hi", "/new", "hi", "/quit"])
    assert "refuses the messages: one turn only" in capsys.readouterr().out
    assert len(held.messages) == 2


def test_a_temperature_draws_and_zero_does_not(model_folder):
    def answers(temperature: float) -> set[str]:
        conversation = Conversation(model_folder, max_new_tokens=8, temperature=temperature)
        found = set()
        for seed in range(4):
            torch.manual_seed(seed)
            found.add(conversation.answer("hi"))
            conversation.restart()
        return found

    assert len(answers(0.0)) == 1
    assert len(answers(1.5)) > 1


@pytest.mark.parametrize("own", [None, 1])
def test_a_draw_is_of_all_tokens_unless_the_model_says_of_how_many(model_folder, own):
    settings = {} if own is None else {"do_sample": True, "top_k": own}
    (model_folder / "generation_config.json").write_text(json.dumps(settings))
    conversation = Conversation(model_folder, max_new_tokens=1, temperature=1e6)  # all are as likely
    torch.manual_seed(0)
    drawn = set()
    for _ in range(80):
        conversation.restart()
        conversation.answer("hi")
        drawn.update(conversation.answer_ids)
    assert len(drawn) == 1 if own else len(drawn) > 50


@pytest.mark.parametrize("temperature", ["-1", "nan", "inf"])
def test_a_temperature_that_is_none_is_refused(model_folder, capsys, temperature):
    assert cli.main(["chat", "--model", str(model_folder), "--temperature", temperature, "-q", "hi"]) == 1
    assert "temperature must be 0" in capsys.readouterr().err


def test_a_saved_conversation_can_be_taken_up_again(model_folder, pictures, tmp_path, monkeypatch, capsys):
    file = tmp_path / "said.json"
    lines = [f"/image {pictures[0]}", "what is it?", f"/save {file}", f"/save {file}", "/quit"]
    held = converse(model_folder, monkeypatch, lines)
    assert "said.json exists; name another file" in capsys.readouterr().out
    held.add_images([Image.new("RGB", (60, 60), "green")])
    held.answer("and this?")
    held.system = [{"role": "system", "content": [{"type": "text", "text": "Be short."}]}]
    held.save(tmp_path / "more.json")
    for path, expected in ((file, held.messages[:2]), (tmp_path / "more.json", [*held.system, *held.messages])):
        messages = json.loads(path.read_text(encoding="utf-8"))
        saved, said = (
            held.processor.apply_chat_template(chat, tokenize=True, return_dict=True, return_tensors="pt")
            for chat in (messages, expected)
        )
        assert torch.equal(saved["input_ids"], said["input_ids"])
        assert torch.equal(saved["pixel_values"], said["pixel_values"])
    assert messages[1]["content"][0] == {"type": "image", "path": str(pictures[0])}


def test_a_later_turn_reads_only_what_is_new(model_folder, pictures):
    conversation = Conversation(str(model_folder), max_new_tokens=4)
    conversation.add_images([str(pictures[0])])
    conversation.answer("what is it?")
    assert conversation.prefixes is not None
    read = len(conversation.prefixes._reads[-1].signature)
    conversation.answer("and now?")
    assert 0 < read - 4 <= conversation.prefixes.num_reused  # but for an answer's end, which is written anew


def test_a_conversation_runs_compiled_where_it_is_asked_to(model_folder, monkeypatch):
    optimized = []
    monkeypatch.setattr("hovle.chat.engines.optimize", lambda model: optimized.append(model) or model)
    Conversation(model_folder)
    assert not optimized
    model = Conversation(model_folder, compiled=True).model
    assert optimized == [model]
    with pytest.raises(ValueError, match="--compile is for --engine torch"):
        Conversation(model_folder, engine="llama.cpp", compiled=True)
