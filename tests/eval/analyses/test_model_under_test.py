"""Where the tokens of a prompt stand in the sequences of a HoVLE-HD."""

import pytest
import torch

from hovle.eval.analyses.model_under_test import HOLISTIC, LANGUAGE, ModelUnderTest


@pytest.fixture
def hd(save_hovle) -> ModelUnderTest:
    """Two by two patches make a token: a placeholder takes four places among the holistic layers, text one."""
    return ModelUnderTest(save_hovle(pixel_shuffle_loc="post"))


def test_answer_queries_of_hd_stand_where_counting_puts_them(hd):
    image = hd.model.config.image_token_id
    #            short 0   1   2      3      4   5      6   7   8   9
    ids = torch.tensor([11, 12, image, image, 13, image, 14, 15, 16, 17])
    # long          0   1   2-5    6-9    10  11-14  15  16  17  18
    holistic, language = hd.sections(ids, 3)  # an answer of three, of which two are in the sequence
    assert (holistic.name, language.name) == (HOLISTIC, LANGUAGE)
    assert language.answer_queries.tolist() == [7, 8, 9]
    assert language.image_mask.nonzero().flatten().tolist() == [2, 3, 5]
    assert holistic.answer_queries.tolist() == [16, 17, 18]
    assert holistic.image_mask.nonzero().flatten().tolist() == [*range(2, 10), *range(11, 15)]
    assert len(holistic.image_mask) == 19


def test_an_answer_of_one_token_looks_from_the_prompts_last_place(hd):
    image = hd.model.config.image_token_id
    holistic, language = hd.sections(torch.tensor([11, image, 12]), 1)
    assert language.answer_queries.tolist() == [2]
    assert holistic.answer_queries.tolist() == [5]


def test_the_words_of_an_answer_enter_the_layers_at_those_places(hd, picture):
    """What goes into the first layer of each section, at the places of the answer's queries, is those words."""
    prompt = hd.prepare(picture, "what is it?")
    answer = hd.encode("a bus")
    ids = torch.cat([prompt.inputs["input_ids"][0], answer[:-1]])
    entered = {}
    sections = hd.sections(ids, len(answer))
    hooks = [
        section.layers[0].register_forward_pre_hook(
            lambda module, arguments, kwargs, name=section.name: entered.update(
                {name: arguments[0] if arguments else kwargs["hidden_states"]}
            ),
            with_kwargs=True,
        )
        for section in sections
    ]
    with torch.inference_mode():
        hd.model(input_ids=ids[None], pixel_values=prompt.inputs["pixel_values"], use_cache=False)
    for hook in hooks:
        hook.remove()
    holistic, language = sections
    words = hd.model.get_input_embeddings()(ids[-len(answer) :])
    assert entered[HOLISTIC].shape[1] == len(holistic.image_mask) == len(ids) + 3 * int(language.image_mask.sum())
    torch.testing.assert_close(entered[HOLISTIC][0, holistic.answer_queries], words)
    assert entered[LANGUAGE].shape[1] == len(language.image_mask) == len(ids)
    patches = entered[HOLISTIC][0, holistic.image_mask]
    assert len(patches) == 16 * len(prompt.inputs["pixel_values"])
    assert torch.equal(patches, hd.model.model.patch_embedding(prompt.inputs["pixel_values"]).flatten(0, 1))
