"""HoVLE as a model of lmms-eval."""

from types import SimpleNamespace

import pytest
import torch

from hovle import HoVLEForConditionalGeneration, HoVLEProcessor


@pytest.fixture(scope="module")
def plugin(lmms_eval):
    import hovle.eval.benchmarks.lmms_eval_plugin as module

    return module


@pytest.fixture(scope="module")
def lm(plugin, model_folder):
    return plugin.HoVLEChat(str(model_folder), batch_size=3, max_new_tokens=5, dtype="float32")


@pytest.fixture(scope="module")
def simple(plugin, model_folder):
    return plugin.HoVLESimple(str(model_folder), batch_size=2, max_new_tokens=5, dtype="float32")


DOCUMENTS = [
    {"text": "What is in the picture?", "pictures": [0]},
    {"text": "Describe the red mat, please, in one short sentence about the street and the corner.", "pictures": []},
    {"text": "Which one is blue?", "pictures": [1, 2]},
    {"text": "How many apples?", "pictures": [4]},
    {"text": "Who waits?", "pictures": [5]},
]


@pytest.fixture
def documents(miniatures):
    """Documents with no, one and two pictures."""
    drawn = [row["image"] for name in ("pope", "mme") for row in miniatures[name].rows]
    return [{**doc, "pictures": [drawn[number] for number in doc["pictures"]]} for doc in DOCUMENTS]


def messages_of(doc: dict) -> list[dict]:
    content = [{"type": "image", "url": picture} for picture in doc["pictures"]]
    return [{"role": "user", "content": [*content, {"type": "text", "text": doc["text"]}]}]


def requests_for(model, documents: list[dict], settings: list[dict] | dict, to_messages=messages_of) -> list:
    """Requests as lmms-eval's chat protocol makes them."""
    from lmms_eval.api.instance import Instance

    model.task_dict["any"] = {"test": documents}
    settings = [settings] * len(documents) if isinstance(settings, dict) else settings
    return [
        Instance(
            request_type="generate_until",
            arguments=(documents[place]["text"], to_messages, dict(settings[place]), place, "any", "test"),
            idx=0,
            metadata={"task": "any", "doc_id": place, "repeats": 1},
        )
        for place in range(len(documents))
    ]


def likelihood_requests(model, documents: list[dict], continuations: list[str]) -> list:
    from lmms_eval.api.instance import Instance

    model.task_dict["any"] = {"test": documents}
    return [
        Instance(
            request_type="loglikelihood",
            arguments=(doc["text"], continuation, lambda doc: doc["pictures"], place, "any", "test"),
            idx=0,
            metadata={"task": "any", "doc_id": place, "repeats": 1},
        )
        for place, (doc, continuation) in enumerate(zip(documents, continuations, strict=True))
    ]


def test_lmms_evals_registry_finds_both_classes_through_the_entry_point(plugin):
    from lmms_eval.models import get_model

    assert get_model("hovle") is plugin.HoVLEChat
    assert get_model("hovle", force_simple=True) is plugin.HoVLESimple


def test_answers_come_in_the_order_of_the_requests_with_their_own_settings(lm, documents):
    settings = [{"max_new_tokens": limit} for limit in (1, 4, 2, 1, 4)]
    together = lm.generate_until(requests_for(lm, documents, settings))
    alone = [
        lm.generate_until(requests_for(lm, [doc], limit))[0] for doc, limit in zip(documents, settings, strict=True)
    ]
    assert [answer.text for answer in together] == [answer.text for answer in alone]
    assert [answer.token_counts.output_tokens for answer in together] == [1, 4, 2, 1, 4]
    assert [answer.token_counts for answer in together] == [answer.token_counts for answer in alone]


def test_text_alone_and_several_pictures_share_a_batch(lm, documents, model_folder):
    answers = lm.generate_until(requests_for(lm, documents[:3], {"max_new_tokens": 5}))
    model = HoVLEForConditionalGeneration.from_pretrained(model_folder, dtype=torch.float32).eval()
    processor = HoVLEProcessor.from_pretrained(model_folder)
    for doc, answer in zip(documents, answers, strict=False):
        pictures = [{"type": "image", "image": picture} for picture in doc["pictures"]]
        chat = [{"role": "user", "content": [*pictures, {"type": "text", "text": doc["text"]}]}]
        inputs = processor.apply_chat_template(
            chat, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        )
        said = model.generate(**inputs, max_new_tokens=5, do_sample=False)[0, inputs["input_ids"].shape[1] :]
        assert processor.decode(said, skip_special_tokens=True).strip() == answer.text
        assert answer.token_counts.input_tokens == inputs["input_ids"].shape[1]


QUESTIONS = ["What is it?", "Who waits at the corner of the street?", "How many apples?"]


def test_questions_about_the_same_picture_read_it_once(lm, documents, monkeypatch):
    """Six questions, two pictures, asked in turns: a picture is read with its first question only."""
    limit = {"max_new_tokens": 5}
    asked = [{"text": text, "pictures": documents[place]["pictures"]} for text in QUESTIONS for place in (0, 4)]
    asked.insert(3, documents[1])
    read = []
    stem = type(lm.model.model.patch_embedding).forward
    monkeypatch.setattr(
        type(lm.model.model.patch_embedding),
        "forward",
        lambda self, pixels: read.append(len(pixels)) or stem(self, pixels),
    )
    alone = [lm.generate_until(requests_for(lm, [doc], limit))[0] for doc in asked]
    num_tiles = sum(read)
    assert lm.num_reused == 0
    read.clear()
    together = lm.generate_until(requests_for(lm, asked, limit))
    assert [answer.text for answer in together] == [answer.text for answer in alone]
    assert [answer.token_counts for answer in together] == [answer.token_counts for answer in alone]
    assert sum(read) * 3 == num_tiles
    assert lm.num_reused > sum(read) * 2 * 4  # four tokens a tile, twice; and the words before them


def test_answers_that_are_drawn_are_not_grouped(lm, documents):
    asked = [{"text": text, "pictures": documents[0]["pictures"]} for text in QUESTIONS]
    for settings in ({"do_sample": True, "temperature": 1.0}, {"num_beams": 2}):
        lm.generate_until(requests_for(lm, asked, {"max_new_tokens": 3, **settings}))
        assert lm.num_reused == 0


def test_chats_that_begin_with_other_words_are_not_grouped(plugin, documents):
    picture = {"type": "image", "image": documents[0]["pictures"][0]}
    text = [{"type": "text", "text": text} for text in QUESTIONS]

    def chat(*items) -> list[dict]:
        return [{"role": "user", "content": list(items)}]

    first = plugin.beginning(chat(picture, text[0]))
    assert first == plugin.beginning(chat({**picture, "image": picture["image"].copy()}, text[1]))
    assert first != plugin.beginning(chat(text[0], picture, text[1]))
    assert first != plugin.beginning(chat({**picture, "image": picture["image"].rotate(90)}, text[0]))
    assert plugin.beginning(chat({"type": "image", "image": "a.png"})) != plugin.beginning(
        chat({"type": "image", "image": "b.png"})
    )
    assert plugin.beginning(chat(text[0])) == ""


def test_tile_limits_reach_the_pictures(lm, documents):
    requests = requests_for(lm, documents[2:3], {"max_new_tokens": 1})
    lm.set_tiles(max_tiles=1)
    few = lm.generate_until(requests)[0].token_counts.input_tokens
    lm.set_tiles(max_tiles=3)
    assert lm.generate_until(requests)[0].token_counts.input_tokens > few
    lm.set_tiles()


def test_a_system_prompt_stands_before_chats_that_have_none(plugin, model_folder):
    lm = plugin.HoVLEChat(str(model_folder), system_prompt="Be short.")
    said = {"role": "user", "content": [{"type": "text", "text": "Hi"}]}
    assert lm._with_system([said])[0] == {"role": "system", "content": [{"type": "text", "text": "Be short."}]}
    own = {"role": "system", "content": [{"type": "text", "text": "Be long."}]}
    assert lm._with_system([own, said]) == [own, said]


def test_videos_are_refused(lm, documents):
    def with_video(doc):
        return [{"role": "user", "content": [{"type": "video", "url": "a.mp4"}]}]

    with pytest.raises(ValueError, match="The task shows a video; HoVLE reads pictures and text"):
        lm.generate_until(requests_for(lm, documents[:1], {}, with_video))


@pytest.mark.parametrize(
    ("settings", "expected", "stops"),
    [
        ({}, {"max_new_tokens": 7, "do_sample": False}, []),
        ({"until": ["\n\n", "A:"], "max_new_tokens": 2}, {"max_new_tokens": 2, "do_sample": False}, ["\n\n", "A:"]),
        ({"until": ["\n\n"]}, {"max_new_tokens": 7, "do_sample": False}, []),  # lmms-eval's default, no task's own
        ({"until": "x", "temperature": 0.2, "do_sample": False}, {"max_new_tokens": 7, "do_sample": False}, ["x"]),
        ({"temperature": 0, "do_sample": True, "top_p": 1.0}, {"max_new_tokens": 7, "do_sample": False}, []),
        ({"temperature": 0.5, "top_p": None}, {"max_new_tokens": 7, "do_sample": True, "temperature": 0.5}, []),
        ({"num_beams": 3, "image_aspect_ratio": "pad"}, {"max_new_tokens": 7, "do_sample": False, "num_beams": 3}, []),
    ],
)
def test_generation_settings_of_tasks_become_arguments(plugin, settings, expected, stops):
    assert plugin.generation_arguments(settings, 7) == (expected, stops)


def test_settings_nobody_knows_are_named_in_a_warning(plugin, caplog):
    plugin.generation_arguments({"colour": "red"}, 7)
    assert "colour" in caplog.text


def test_an_answer_ends_before_the_first_of_its_stops(plugin):
    assert plugin.cut_at("one. two\n\nthree A: four", ["A:", "\n\n"]) == "one. two"
    assert plugin.cut_at("one", [""]) == "one"


def test_rounds_of_several_conversations_advance_together_and_end_each_on_its_own(lm, documents):
    seen = []

    def next_round(doc, round_idx=None, previous_output=None, previous_round_info=None):
        if round_idx is None:
            return messages_of(doc)
        seen.append((doc["text"], round_idx, list(previous_output), previous_round_info))
        is_over = round_idx > len(doc["pictures"])
        messages = [{"role": "user", "content": [{"type": "text", "text": f"And now? {round_idx}"}]}]
        return (None if is_over else messages), is_over, previous_output, f"note {round_idx}"

    replies = lm.generate_until_multi_round(requests_for(lm, documents[:3], {"max_new_tokens": 3}, next_round))
    assert [len(each) for each in replies] == [2, 1, 3]
    assert (documents[2]["text"], 2, replies[2][:2], "note 1") in seen
    first = lm.generate_until(requests_for(lm, documents[:3], {"max_new_tokens": 3}))
    assert [each[0] for each in replies] == [answer.text for answer in first]


def test_likelihoods_are_those_of_the_reply_whatever_shares_the_batch(lm, simple, documents):
    continuations = [" a cat", "the red mat sleeps on the table", "b", "two", "dog"]
    lm.batch_size = 1
    alone = lm.loglikelihood(likelihood_requests(lm, documents, continuations))
    lm.batch_size = 5
    together = lm.loglikelihood(likelihood_requests(lm, documents, continuations))
    lm.batch_size = 3
    assert [greedy for _, greedy in together] == [greedy for _, greedy in alone]
    torch.testing.assert_close([loss for loss, _ in together], [loss for loss, _ in alone], atol=1e-5, rtol=1e-5)
    (_, (loss, _), *_) = simple.loglikelihood(likelihood_requests(simple, documents, continuations))
    (_, (expected, _), *_) = alone
    assert loss == pytest.approx(expected)


def test_choices_about_the_same_picture_read_it_once(lm, documents):
    """Neighbours that begin alike: equal likelihoods, and of the second on only what is new is read."""
    asked = [documents[1], *[documents[2]] * 4, {**documents[2], "text": "Who?"}, documents[3]]
    continuations = ["a cat", "two", "two apples", "two apples on the mat", "three", "dog", "b"]
    alone = [
        lm.loglikelihood(likelihood_requests(lm, [doc], [text]))[0]
        for doc, text in zip(asked, continuations, strict=True)
    ]
    assert lm.num_reused == 0
    together = lm.loglikelihood(likelihood_requests(lm, asked, continuations))
    assert [greedy for _, greedy in together] == [greedy for _, greedy in alone]
    torch.testing.assert_close([loss for loss, _ in together], [loss for loss, _ in alone], atol=1e-5, rtol=1e-5)
    lengths = [
        lm._encode([lm._likelihood_chat(one)[0]])["input_ids"].shape[1]
        for one in likelihood_requests(lm, asked, continuations)
    ]
    assert lm.num_reused > 3 * (
        lengths[1] - 1
    )  # all but the last token of three prompts, and the pictures of a fourth


def test_a_likelihood_is_the_loss_of_the_reply_tokens_alone(lm, documents):
    ((loss, is_greedy),) = lm.loglikelihood(likelihood_requests(lm, documents[:1], ["cat"]))
    inputs = lm._encode([lm._first_chat(requests_for(lm, documents[:1], {})[0])])
    prompt_length = inputs["input_ids"].shape[1]
    reply = lm._reply_ids("cat")
    inputs["input_ids"] = torch.cat([inputs["input_ids"][0], reply])[None]
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    labels = inputs["input_ids"].clone()
    labels[:, :prompt_length] = -100
    with torch.inference_mode():
        assert loss == pytest.approx(lm.model(**inputs, labels=labels).loss.item(), abs=1e-5)
    assert not is_greedy


def test_a_reply_the_model_would_give_is_greedy(lm, documents):
    said = lm.generate_until(requests_for(lm, documents[:1], {"max_new_tokens": 1}))[0].text
    ids = lm._reply_ids(said)
    if len(ids) != 1:
        pytest.fail(f"{said!r} is no single token; choose another seed for the tiny model")
    ((loss, is_greedy),) = lm.loglikelihood(likelihood_requests(lm, documents[:1], [said]))
    assert is_greedy
    assert loss > 0


def test_an_empty_continuation_is_refused(lm, documents):
    with pytest.raises(ValueError, match="without a single token"):
        lm.loglikelihood(likelihood_requests(lm, documents[:1], [" "]))


def test_the_simple_protocol_gives_the_same_answers(lm, simple, documents):
    chat = lm.generate_until(requests_for(lm, documents, {"max_new_tokens": 4}))
    old = requests_for(simple, documents, {"max_new_tokens": 4})
    for request in old:
        text, _, settings, *place = request.arguments
        request.arguments = (text, settings, lambda doc: [doc["pictures"]], *place)
    assert [answer.text for answer in simple.generate_until(old)] == [answer.text for answer in chat]


def test_the_simple_protocol_has_rounds_too(simple, documents):
    def next_round(doc, round_idx, previous_output, previous_round_info):
        return doc["pictures"], f"Sure? {previous_output[-1]}", round_idx == 2, previous_output, None

    requests = requests_for(simple, documents[:2], {"max_new_tokens": 2})
    for request in requests:
        text, _, settings, *place = request.arguments
        request.arguments = (text, settings, lambda doc: doc["pictures"], next_round, *place)
    assert [len(replies) for replies in simple.generate_until_multi_round(requests)] == [2, 2]


def test_multiple_choice_by_likelihood_runs_through_the_harness(simple, tmp_path, miniatures):
    import datasets
    from lmms_eval.evaluator import simple_evaluate
    from lmms_eval.tasks import TaskManager

    rows = [{"question": "Which?", "image": row["image"], "choices": ["cat", "dog"], "answer": 0}
            for row in miniatures["pope"].rows]  # fmt: skip
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "test.parquet")
    config = {
        "task": "choice",
        "dataset_path": "parquet",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "test.parquet")}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_visual": lambda doc: [doc["image"]],
        "doc_to_text": "question",
        "doc_to_choice": "choices",
        "doc_to_target": "answer",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }
    manager = TaskManager(include_defaults=False)
    (task,) = manager.load_task_or_group([config], "simple").values()
    task.config.task = "choice"  # the harness takes the name out of configurations of tasks it has no file of
    simple.keep_loaded = True
    result = simple_evaluate(
        model=simple, tasks=[task], task_manager=manager, bootstrap_iters=0, process_docs_parallel=1
    )
    first, second = (
        [
            loss
            for loss, _ in simple.loglikelihood(
                likelihood_requests(simple, [_as_doc(row) for row in rows], [word] * 3)
            )
        ]
        for word in ("cat", "dog")
    )
    expected = sum(a < b for a, b in zip(first, second, strict=True)) / 3
    assert result["results"]["choice"]["acc,none"] == pytest.approx(expected)


def _as_doc(row: dict) -> dict:
    return {"text": row["question"], "pictures": [row["image"]]}


def test_speed_is_reported_to_the_harness(lm, documents):
    from lmms_eval.models.model_utils.gen_metrics import reset_logged_metrics, summarize_logged_metrics

    reset_logged_metrics()
    lm.generate_until(requests_for(lm, documents, {"max_new_tokens": 2}))
    summary = summarize_logged_metrics()
    assert summary["total_gen_tokens"] == 10
    assert summary["avg_answer_tokens"] == 2
    assert summary["avg_prompt_tokens"] > 5
    assert summary["avg_answers_per_second"] == pytest.approx(5 / summary["total_elapsed_time"])


def test_an_evaluation_drops_the_model_unless_told_to_keep_it(plugin, model_folder):
    lm = plugin.HoVLEChat(str(model_folder), keep_loaded=True)
    lm.clean()
    assert lm.model is not None
    lm.keep_loaded = False
    lm.clean()
    assert not hasattr(lm, "model")


@pytest.mark.parametrize(
    ("text", "fields"), [({"tie_word_embeddings": True}, {}), ({}, {"pixel_shuffle_loc": "post"})], ids=["tied", "HD"]
)
def test_tied_and_high_definition_models_answer_too(
    text, fields, plugin, documents, make_tokenizer, tiny_config, tmp_path
):
    torch.manual_seed(1)
    config = tiny_config(text, **fields)
    HoVLEForConditionalGeneration(config).save_pretrained(tmp_path)
    HoVLEProcessor.from_language_model(make_tokenizer(), config, max_tiles=2).save_pretrained(tmp_path)
    answers = []
    for batch_size in (1, 5):
        lm = plugin.HoVLEChat(str(tmp_path), batch_size=batch_size)
        answers.append(lm.generate_until(requests_for(lm, documents, {"max_new_tokens": 4})))
    assert answers[0] == answers[1]  # texts and token counts
    assert all(1 <= answer.token_counts.output_tokens <= 4 for answer in answers[0])


@pytest.mark.parametrize("batch_size", ["auto", 0, "-2"])
def test_batch_sizes_that_are_no_numbers_are_refused(plugin, model_folder, batch_size):
    with pytest.raises(ValueError, match="must be a whole number from 1"):
        plugin.HoVLEChat(str(model_folder), batch_size=batch_size)


def test_arguments_of_the_command_line_are_read(plugin, model_folder):
    lm = plugin.HoVLEChat.create_from_arg_string(
        f"pretrained={model_folder},max_tiles=2,dtype=bfloat16", {"batch_size": "4", "device": "cpu"}
    )
    assert (lm.batch_size, lm.tile_limits, lm.model.dtype) == (4, {"max_tiles": 2}, torch.bfloat16)


def test_a_process_of_several_has_its_rank(plugin, model_folder, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(plugin, "_accelerator", lambda: SimpleNamespace())
    lm = plugin.HoVLEChat(str(model_folder))
    assert (lm.rank, lm.world_size) == (1, 2)
