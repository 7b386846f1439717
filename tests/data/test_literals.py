"""Lists read out of Python by parsing: against what Python makes of the same expressions, and what is refused."""

from __future__ import annotations

import string

import pytest

from molmo2_nemo.data.literals import SourceFile, assigned_in
from molmo2_nemo.errors import DataError, UserError

READABLE = """
import string

A = ["one", "two" " and more", 'th"ree']
B = A + ["four"]
B += ["five"]
T = {"x": ["x1 {q}", "x2"], "y": []}
T["z"] = [w.replace("x", "zz").lower().strip() for w in T["x"] if w != "x2"]
T["y"] = T["x"]
S = sorted(set(["b", "a"] + [v.rstrip() for v in ["a ", "c "] if v.strip() == "c"]))
N = [str(i) for i in range(2, 5)] + list(string.ascii_lowercase[:0] for _ in [])
L = string.ascii_uppercase
P = [("a", "b"), (["c"], "d")]
"""


def source(tmp_path, text):
    path = tmp_path / "some.py"
    path.write_text(text, encoding="utf-8")
    return SourceFile(path)


def test_what_python_makes_of_it(tmp_path):
    text = READABLE.replace(" + list(string.ascii_lowercase[:0] for _ in [])", "")
    file, namespace = source(tmp_path, text), {}
    exec(text, namespace)  # the test's own text
    for name in "ABTSNL":
        assert file.value(name) == namespace[name], name
    assert file.value("P") == [["a", "b"], [["c"], "d"]]  # pairs become lists
    assert file.value("L") == string.ascii_uppercase


def test_functions_with_placeholders(tmp_path):
    file = source(
        tmp_path,
        "def f(a, b):\n    assert a\n    return [f'{a}: {b}', f'only {b}!']\n"
        "def g(n):\n    out = ['one']\n    if n:\n        out += [f'two {n}']\n"
        "    out += [x for x in ['p', 'q'] if x not in n]\n    return sorted(out)\n",
    )
    assert file.returned("f", "question", "options") == ["{question}: {options}", "only {options}!"]
    assert file.local("g", "out", "name", iterated=True) == [["one"], ["two {name}"], ["p", "q"]]
    with pytest.raises(DataError, match="there is no function h"):
        file.returned("h")
    with pytest.raises(DataError, match=r"g\(\) assigns nothing to other"):
        file.local("g", "other")
    with pytest.raises(DataError, match="line 9: 'out' cannot be read"):
        file.returned("g", "name")


def test_classes(tmp_path):
    file = source(tmp_path, "class A:\n    texts = ['a', 'b']\nclass B:\n    texts = 3\nclass C:\n    pass\n")
    first, second, third = file.classes()
    assert assigned_in(first, "texts") == ["a", "b"] and assigned_in(third, "texts") is None
    with pytest.raises(DataError, match="line 4: expected a list of strings"):
        assigned_in(second, "texts")


@pytest.mark.parametrize(
    "expression",
    [
        "open('/etc/passwd').read()",
        "__import__('os').environ",
        "[x for x in ().__class__.__mro__]",
        "'a' * 10**9",
        "range(10**9)",
        "['a'].append('b')",
        "'{0.__class__}'.format(1)",
        "f'{1 + 1}'",
        "f'{\"a\":>1000000000}'",
        "(lambda: ['a'])()",
        "[a for a in ['x'] for b in ['y']]",
        "{'a': ['b'], **{}}",
        "[*['a']]",
        "sorted(['a'], key=len)",
        "sorted([1, 'a'])",
        "str()",
        "'a'.replace('b')",
        "'a' + ['b']",
        "unknown",
        "string.printable",
    ],
)
def test_more_than_data_is_refused_when_it_is_asked_for(tmp_path, expression):
    file = source(tmp_path, f"GOOD = ['a']\nBAD = {expression}\n")
    assert file.value("GOOD") == ["a"]
    with pytest.raises(DataError, match=r"some\.py: line 2: "):
        file.value("BAD")


def test_what_grows_without_end_is_refused(tmp_path):
    doubled = "A = 'aaaaaaaaaaaaaaaa'\n" + "A = A + A\n" * 40
    with pytest.raises(DataError, match="not too long"):
        source(tmp_path, doubled).value("A")
    replaced = "A = 'a'\n" + "A = A.replace('a', 'aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa')\n" * 20
    with pytest.raises(DataError, match="too long"):
        source(tmp_path, replaced).value("A")
    deep = "A = " + " + ".join(["['a']"] * 20_000)
    with pytest.raises(DataError):
        source(tmp_path, deep).value("A")


@pytest.mark.parametrize("text", ["def f(:\n", "A = [\n", "A = 'a\0b'\n", "(" * 500])
def test_files_that_are_no_python(tmp_path, text):
    with pytest.raises(DataError, match=r"some\.py.*cannot be parsed as Python"):
        source(tmp_path, text)


def test_files_that_are_no_text(tmp_path):
    (tmp_path / "a.py").write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match="byte 1 is not UTF-8"):
        SourceFile(tmp_path / "a.py")
    with pytest.raises(UserError, match="no such file"):
        SourceFile(tmp_path / "b.py")


def test_a_later_assignment_wins_and_a_bad_one_is_told(tmp_path):
    file = source(
        tmp_path, "T = {'a': ['1']}\nT['a'] = open('x')\nT['b'] = open('y')\nU = 1\nU = open('z')\nU = ['2']\n"
    )
    assert file.value("U") == ["2"]
    assert "line 2" in str(file.unread("T['a']")) and "line 3" in str(file.unread("T['b']"))
    with pytest.raises(DataError, match="nothing is assigned to V"):
        file.value("V")
