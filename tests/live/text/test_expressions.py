"""Grammars that come to one expression: its texts are theirs, and what is no such grammar is refused."""

import re

import pytest

from orchestrator.live.text.expressions import NoExpression, expression_of

#: How an editor's patches are described to models that write them.
PATCH = """
start: begin hunk+ end
begin: "*** Begin Patch" LF
end: "*** End Patch" LF?

hunk: add | remove      // one file each
    | update
add: "*** Add File: " name LF added+
remove: "*** Delete File: " name LF
update: "*** Update File: " name LF moved? change?

name: /(.+)/
added: "+" /(.*)/ LF -> line
moved: "*** Move to: " name LF
change: (context | changed)+ last?
context: ("@@" | "@@ " /(.+)/) LF
changed: ("+" | "-" | " ") /(.*)/ LF
last: "*** End of File" LF

%import common.LF
"""


@pytest.mark.parametrize(
    ("grammar", "texts", "others"),
    [
        (
            PATCH,
            [
                "*** Begin Patch\n*** Delete File: a.py\n*** End Patch",
                '*** Begin Patch\n*** Update File: a\n*** Move to: b\n@@ f():\n-x "y"\n+\\z\n*** End of File\n*** End Patch\n',
            ],
            ["*** Begin Patch\n*** End Patch", "*** Begin Patch\n*** Delete File: \n*** End Patch", "*** Begin Patch"],
        ),
        ('start: "a".."f" ~ 2..3 | "x"~2', ["ab", "fff", "xx"], ["a", "gg", "xxx"]),
        ('?start: [sign] INT ("." INT)?\n!sign.2: "-"|"+"\nINT: /[0-9]/+', ["1", "-12", "+1.20"], ["", "--1", "1."]),
        ('start: ("a.b"i | /c(d|e)/i)* # both', ["", "A.Bcd", "CEa.b"], ["axb", "c"]),
        (r'start: "\"" /[^"\/\]]/ "\\" "é\n"', ['"x\\é\n'], ['"/\\é\n', "x"]),
        ("%import common (WS_INLINE, CNAME)\n%import common.INT -> N\nstart: CNAME WS_INLINE N", ["a_1  23"], ["1 a"]),
    ],
)
def test_the_expression_has_the_texts_of_the_grammar(grammar: str, texts: list[str], others: list[str]) -> None:
    found = expression_of(grammar)
    assert [text for text in texts if not re.fullmatch(found, text)] == []
    assert [text for text in others if re.fullmatch(found, text)] == []


@pytest.mark.parametrize(
    ("grammar", "problem"),
    [
        ('start: "(" start? ")"', "refers to itself: 'start'"),
        ('start: a\na: b "x"\nb: a | "y"', "refers to itself: 'a'"),
        ('a: "x"', "no rule 'start'"),
        ("", "no rule 'start'"),
        ("start: b", "no rule 'b'"),
        ('start: "a"\nstart: "b"', "two rules called 'start'"),
        ('start: "a"\n%ignore " "', "not understood here: '%ignore"),
        ("%import python.NAME\nstart: NAME", "imports what is not known here"),
        ('start: ("a"', "lacks a '\\)'"),
        ('start: "a" ~', "lacks a number"),
        ('start: "a")', "not understood here: '\\)'"),
        ("start: " + "(" * 2000 + '"a"' + ")" * 2000, "more than 100 others"),
        ("\n".join(f"{name}: {name}x" for name in ("start" + "x" * count for count in range(300))), "more than 100 others"),
        ("\n".join(["start: a0", *(f"a{place}: a{place + 1} a{place + 1}" for place in range(60)), 'a60: "x"']), "longer than"),
        ("start: /" + "[a]" * 3000, "not understood here"),
    ],
)
def test_what_comes_to_no_expression_is_refused(grammar: str, problem: str) -> None:
    with pytest.raises(NoExpression, match=problem):
        expression_of(grammar)
