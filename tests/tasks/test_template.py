import pytest

from softprompt.tasks.errors import TaskError
from softprompt.tasks.template import from_before_columns, parse_template


def parse(template, text_column="premise", label_column="Label"):
    return parse_template(template, text_column, label_column)


ROW = {"text": "a b", "hypothesis": "c", "Tweet id": "7", "label": "mine"}
FILLED = {
    "{text} => {hypothesis}": "a b => c",
    "{hypothesis}{text}{hypothesis}": "ca bc",
    "{premise} => {hypothesis} :": "a b => c :",
    "{text_column}: {text}, {Tweet id}\n": "premise: a b, 7\n",
    "{{text}} {text}": "{text} a b",
    "{{{text}}}": "{a b}",
    "}}{text}{{": "}a b{",
    '{{"q": "{text}"}}': '{"q": "a b"}',
    "{label}: {text}": "mine: a b",  # a column of that name which is not the label column
}


@pytest.mark.parametrize("template, filled", FILLED.items())
def test_names_in_braces_are_the_cells_of_a_row(template, filled):
    assert parse(template).fill(ROW) == filled


def test_braces_and_backslashes_in_cells_are_left_alone():
    row = {"text": "{hypothesis} {{x}} \\n", "hypothesis": "{text}"}
    assert parse("{text} | {hypothesis}").fill(row) == "{hypothesis} {{x}} \\n | {text}"


def test_the_columns_are_those_beside_the_text_each_once():
    assert parse("{b} {text} {a} {b} {{c}} {text_column}").columns == ("b", "a")
    assert parse("{premise}").columns == ()


BAD = {
    "no place": "must contain {text} exactly once",
    "{text} {text}": "must contain {text} exactly once",
    "{text} {premise}": "must contain {text} exactly once",
    "{{text}}": "must contain {text} exactly once",
    "{text} {": "has '{' without the name of a column: write {{ or }}",
    "{text} }": "has '}' without the name of a column",
    "{text} {}": "has '{}' without the name of a column",
    '{"q": "{text}"}': "has '{' without the name of a column",
    "{text} {Label}": "has {Label}, the column of the labels: leave it out, the label is written behind",
}


@pytest.mark.parametrize("template, message", BAD.items())
def test_a_template_that_cannot_be_filled_is_refused(template, message):
    with pytest.raises(TaskError) as error:
        parse(template)
    assert message in str(error.value)


def test_a_row_without_a_column_is_refused():
    with pytest.raises(TaskError, match=r"the template reads \{hypothesis\} and got a text alone"):
        parse("{text} {hypothesis}").fill("a")


def filled_before_columns(template, text, text_column):
    """What the template was before columns: two names, and nothing else of a meaning."""
    before, after = (part.replace("{text_column}", text_column) for part in template.split("{text}"))
    return before + text + after


@pytest.mark.parametrize(
    "template",
    [
        "{text_column} : {text} Label : ",
        "{premise} => {hypothesis}: {text}",
        "{{text}}",
        "{{{text}}} {",
        "}{text}{}{text_column}}",
        "{text}\\n{label} {Label}",
    ],
)
def test_a_template_of_an_older_adapter_keeps_its_meaning(template):
    now = from_before_columns(template)
    assert parse(now).fill("{a} {text_column}") == filled_before_columns(
        template, "{a} {text_column}", "premise"
    )
    assert parse(now).columns == ()
