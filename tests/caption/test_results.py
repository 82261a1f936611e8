"""Files of results: what was written is read again, whatever interrupted the writing."""

import json

import pytest

from hovle.caption.results import Results

SETTINGS = {"prompt": "what?"}


def result(name: str, caption: str = "it") -> dict:
    return {"name": name, "caption": caption}


def read(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_results_end_in_the_order_of_the_input_with_a_line_for_each_item(tmp_path):
    path = tmp_path / "new" / "results.jsonl"
    with Results(path, ["b", "a", "b", "\udcff"], SETTINGS, resume=False) as results:
        assert results.missing == ["b", "a", "\udcff"]
        results.add([result("a"), {"name": "\udcff", "error": "broken"}])
        assert read(path) == [result("a"), {"name": "\udcff", "error": "broken"}]
        results.add([result("b", "ö\n")])
        assert results.finish() == read(path)
    assert read(path) == [result("b", "ö\n"), result("a"), result("b", "ö\n"), {"name": "\udcff", "error": "broken"}]


@pytest.mark.parametrize("cut", range(1, 8))
def test_a_line_that_was_cut_short_is_made_again(tmp_path, cut):
    path = tmp_path / "results.jsonl"
    with Results(path, ["a", "b"], SETTINGS, resume=False) as results:
        results.add([result("a"), result("b")])
    path.write_bytes(path.read_bytes()[:-cut])
    with Results(path, ["a", "b"], SETTINGS, resume=True) as results:
        assert results.missing == ["b"]
        assert read(path) == [result("a")]
        results.add([result("b", "again")])
        results.finish()
    assert read(path) == [result("a"), result("b", "again")]


def test_errors_are_tried_again_and_new_items_join(tmp_path):
    path = tmp_path / "results.jsonl"
    with Results(path, ["a", "b"], SETTINGS, resume=False) as results:
        results.add([{"name": "a", "error": "gone"}, result("b")])
        results.finish()
    with Results(path, ["c", "a", "b"], SETTINGS, resume=True) as results:
        assert results.missing == ["c", "a"]
        results.add([result("a"), result("c")])
        results.finish()
    assert read(path) == [result("c"), result("a"), result("b")]


def test_what_does_not_belong_together_is_refused(tmp_path):
    path = tmp_path / "results.jsonl"
    with Results(path, ["a"], SETTINGS, resume=True) as results:
        results.add([result("a")])
    with pytest.raises(ValueError, match=r"results\.jsonl is there already: go on with it \(--resume\)"):
        Results(path, ["a"], SETTINGS, resume=False)
    with pytest.raises(ValueError, match=r"was made with prompt 'what\?', now it is 'who\?': say the same"):
        Results(path, ["a"], {"prompt": "who?"}, resume=True)
    with pytest.raises(ValueError, match=r"results\.jsonl:1 is the result of 'a', which is not among the pictures"):
        Results(path, ["b"], SETTINGS, resume=True)
    for damage, message in {"{\n": "is no JSON", "[1]\n": "is no result, which has a name"}.items():
        path.write_text(damage)
        with pytest.raises(ValueError, match=rf"results\.jsonl:1 {message}"):
            Results(path, ["a"], SETTINGS, resume=True)
    path.with_name("results.jsonl.settings.json").unlink()
    with pytest.raises(ValueError, match="which says how it was made, is not beside it"):
        Results(path, ["a"], SETTINGS, resume=True)


def test_two_do_not_write_one_file(tmp_path):
    path = tmp_path / "results.jsonl"
    with Results(path, ["a", "b"], SETTINGS, resume=False) as results:
        with pytest.raises(ValueError, match="written by another process"):
            Results(path, ["a", "b"], SETTINGS, resume=True)
        results.add([result("a")])
    with Results(path, ["a", "b"], SETTINGS, resume=True) as results:  # its end, whatever it was, lets the next one in
        assert results.missing == ["b"]
