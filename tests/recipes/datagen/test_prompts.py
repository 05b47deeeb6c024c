"""The templates: versions, folders of one's own, and that each question says all it must."""

import shutil

import pytest

from tw_recipes.datagen.annotator import REPLIES
from tw_recipes.datagen.prompts import QUESTIONS, Prompts


def test_a_folder_of_ones_own_replaces_the_templates_and_changes_the_digest(tmp_path):
    packaged = Prompts()
    own = tmp_path / "mine"
    shutil.copytree(packaged.folder, own)
    assert Prompts(str(own)).digest == packaged.digest
    with (own / "system.jinja").open("a") as file:
        file.write("\nBe brief.")
    changed = Prompts(str(own))
    assert changed.system == packaged.system + "\n\nBe brief."
    assert changed.digest != packaged.digest
    (own / "check.jinja").unlink()
    with pytest.raises(ValueError, match=r"prompts must be one of v1 or a folder with a template .* lacks check.jinja"):
        Prompts(str(own))


def test_every_question_has_a_shape_and_a_missing_value_is_an_error():
    assert set(REPLIES) == set(QUESTIONS)
    with pytest.raises(Exception, match="'numbered' is undefined"):
        Prompts().render("steps", question="q", count=1)


@pytest.mark.parametrize("question", ["steps", "blocks", "check"])
def test_questions_about_one_trace_begin_alike_for_prefix_caches(question):
    values = {"question": "q", "numbered": "L1| a\nL2| b", "count": 2, "steps": [], "threads": [{"first_line": 1}]}
    head = "The problem:\n> q\n\nThe worked text, with line numbers:\nL1| a\nL2| b\n"
    assert Prompts().render(question, **values | {"threads": [{"first_line": 1, "last_line": 2}]}).startswith(head)


@pytest.mark.parametrize("question", QUESTIONS)
def test_the_shape_of_a_reply_is_strict_and_its_fields_are_in_the_question(question):
    schema = REPLIES[question].model_json_schema()
    shapes = [schema, *schema.get("$defs", {}).values()]
    text = (Prompts().folder / f"{question}.jinja").read_text()
    for shape in shapes:
        assert shape["additionalProperties"] is False
        assert sorted(shape["required"]) == sorted(shape["properties"])
        for name in shape["properties"]:
            assert name in text
