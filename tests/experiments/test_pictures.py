"""Arabic and Hebrew in pictures: joined letters, from right to left, with their weights."""

import numpy as np
import pytest
from matplotlib.figure import Figure

from experiments.training import class_pictures, fonts, pictures

ZWJ, RLM = "\u200d", "\u200f"
DRAWABLE = fonts.glyphs()
MAY = "٣ مايو ١٩٩٩"


def seen(text):
    return "".join(text[i] for i in fonts.visual_order(text))


def forms(text):
    """The form in which each character is drawn: it joins on no, one or both sides."""
    names = {(False, False): "isolated", (False, True): "initial"} | {
        (True, False): "final", (True, True): "medial"
    }  # fmt: skip
    cells = fonts.cells(text, DRAWABLE)
    return [names[cell.startswith(ZWJ), cell.endswith(ZWJ)] for cell in cells]


@pytest.fixture
def saved(monkeypatch):
    """The figures that are saved, none of them to a file."""
    figures = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: figures.append(figure))
    return figures


@pytest.mark.parametrize(
    "text, expected",
    [
        ("بتب", ["initial", "medial", "final"]),
        ("اب", ["isolated", "isolated"]),  # alef joins to nothing after it
        ("ابت", ["isolated", "initial", "final"]),
        ("با", ["initial", "final"]),
        ("ب ب", ["isolated"] * 3),
        ("بءب", ["isolated"] * 3),
        ("ب1ب", ["isolated"] * 3),
        ("هـ", ["initial", "final"]),
        ("بَب", ["initial", "isolated", "final"]),  # the letters join across a mark
        ("می\u200cب", ["initial", "final", "isolated", "isolated"]),  # ZWNJ parts letters
        ("بڕب", ["initial", "final", "isolated"]),  # of languages with letters of their own
        ("بەب", ["initial", "final", "isolated"]),
        ("بڵب", ["initial", "medial", "final"]),
        ("אבג", ["isolated"] * 3),
    ],
)
def test_a_letter_has_the_form_that_it_has_in_its_word(text, expected):
    assert forms(text) == expected


def test_a_cell_shows_its_character_or_says_which_it_is():
    assert fonts.cells("a b", DRAWABLE) == ["a", "␣", "b"]
    assert fonts.cells("بۀ", DRAWABLE - {"ۀ"}) == ["ب" + ZWJ, "U+06C0"]
    assert fonts.cells("(a", DRAWABLE) == ["(", "a"]
    assert fonts.cells("(א", DRAWABLE)[0] == RLM + "("
    assert fonts.cells("", DRAWABLE) == []


@pytest.mark.parametrize(
    "text, expected",
    [
        ("", ""),
        ("May 3, 1999 (x)", "May 3, 1999 (x)"),
        ("3/5/1999", "3/5/1999"),
        ("אבג", "גבא"),
        ("3 במאי 1999", "1999 יאמב 3"),
        (MAY, "١٩٩٩ ويام ٣"),
        ("يوم 3/5/1999 م", "م 3/5/1999 موي"),
        ("نحو 12.5%", "%12.5 وحن"),
        ("כ-12.5%", "12.5%-כ"),
        ("قال hello world لنا", "انل hello world لاق"),
        ("שם Cairo (EG) א", "א Cairo (EG) םש"),
        ("the word كلمة here", "the word ةملك here"),
        ("ב\u05b8א", "א\u05b8ב"),  # a mark stands after its letter
    ],
)
def test_lines_run_right_to_left_and_numbers_and_latin_left_to_right(text, expected):
    assert seen(text) == expected


def test_a_right_to_left_text_is_embedded_in_a_line_and_others_stay():
    assert fonts.embedded("3 May") == "3 May"
    line = f"{fonts.embedded('3 במאי')} → 1999-05-03"
    assert not fonts.is_right_to_left(line)


@pytest.mark.parametrize("source", [MAY, "3 במאי 1999", "May 3, 1999", "ما " * 50])
def test_columns_of_an_alignment_stand_in_visual_order_with_their_weights(source, saved, tmp_path):
    output = "مايو 3"
    weights = np.arange(6 * len(source)).reshape(6, -1) / (6 * len(source))
    pictures.alignments(
        [pictures.Alignment(f"{source} → {output}", source, output, weights)], tmp_path / "x.png"
    )
    axis, cut = saved[0].axes[0], source[: pictures.LONGEST]
    order, cells = fonts.visual_order(cut), fonts.cells(cut, DRAWABLE)
    drawn = [label.get_text() for label in axis.get_xticklabels()]
    assert drawn == [cells[i] for i in order]
    np.testing.assert_array_equal(axis.images[0].get_array(), weights[:, order])
    rows = [label.get_text() for label in axis.get_yticklabels()]
    assert rows == fonts.cells(output, DRAWABLE)


@pytest.mark.parametrize("text", [MAY, "שלום 42", "hello", "سلام ۀ\u0710", "ما " * 50])
def test_cells_of_a_strip_stand_in_visual_order_with_their_weights(text, saved, tmp_path):
    weights = np.arange(len(text)) / len(text)
    class_pictures.strips([class_pictures.Strip("x", text, weights)], tmp_path / "x.png")
    axis, cut = saved[0].axes[0], text[: class_pictures.LONGEST]
    order, cells = fonts.visual_order(cut), fonts.cells(cut, DRAWABLE)
    assert [each.get_text() for each in axis.texts] == [cells[i] for i in order]
    np.testing.assert_array_equal(axis.images[0].get_array()[0], weights[order])


def test_pictures_of_right_to_left_texts_are_drawn_without_a_missing_glyph(tmp_path):
    texts = [MAY, "3 במאי (1999)", "بَتب می\u200cب [x]", "کوردی ڕۆژنامە"]
    panels = [
        pictures.Alignment(f"{text} → {text}", text, text, np.eye(len(text))) for text in texts
    ]
    pictures.alignments(panels, tmp_path / "alignment.png")
    rows = [class_pictures.Strip(text, text, np.ones(len(text))) for text in texts]
    class_pictures.strips(rows, tmp_path / "strips.png")
    class_pictures.confusion(np.eye(len(texts)), texts, tmp_path / "confusion.png")
    assert len(list(tmp_path.iterdir())) == 3
