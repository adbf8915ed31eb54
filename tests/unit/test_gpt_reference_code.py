"""The code in the references of the question sets runs and does what its question asks for."""
# ruff: noqa: RUF001 (Japanese texts have full-width signs)

from __future__ import annotations

import re
import sqlite3
import subprocess
import sys

import pytest

from tests.unit.test_gpt_references import QUESTIONS, block, reference

RAISES = """
def raises(function, *arguments):
    try:
        function(*arguments)
    except ValueError:
        return True
    return False
"""
CHECKS = {
    41: """
assert count_vowels("") == 0 and count_vowels("rhythm") == 0
assert count_vowels("AEIOU and Yes") == 7
assert count_vowels("\u0130") == 0
""",
    42: """
assert second_largest([5, 5, 3]) == 3 and second_largest([1, 9, 4, 9]) == 4 and second_largest([-1, -2]) == -2
assert raises(second_largest, []) and raises(second_largest, [7, 7])
""",
    44: """
assert add_tag("red") == ["red"] and add_tag("blue") == ["blue"]
mine = ["x"]
assert add_tag("y", mine) is mine and mine == ["x", "y"]
""",
    45: """
assert parse_duration("1h30m") == 5400 and parse_duration("45s") == 45 and parse_duration("2h5s") == 7205
assert parse_duration("0m") == 0
for text in ("", "5", "h", "1m1h", "1h 5m", "1h1h", "-1s", "1.5h", "5s\\n", "\u0665s", "1H"):
    assert raises(parse_duration, text), text
""",
    47: """
assert free_slots([], 0, 10) == [(0, 10)] and free_slots([], 3, 3) == []
assert free_slots([(4, 6), (1, 2), (5, 8)], 0, 10) == [(0, 1), (2, 4), (8, 10)]
assert free_slots([(-5, 1), (9, 20)], 0, 10) == [(1, 9)] and free_slots([(-5, 20)], 0, 10) == []
assert free_slots([(0, 9), (1, 2), (9, 10)], 0, 10) == [] and free_slots([(12, 14)], 0, 10) == [(0, 10)]
assert free_slots([(-9, -3)], 0, 10) == [(0, 10)]
import random
for seed in range(300):
    draw = random.Random(seed)
    busy = [(a, a + draw.randint(1, 6)) for a in (draw.randint(-5, 25) for _ in range(draw.randint(0, 5)))]
    covered = {minute for a, b in busy for minute in range(a, b)}
    slots = free_slots(busy, 0, 20)
    assert slots == sorted(slots) and all(a < b for a, b in slots)
    assert [minute for a, b in slots for minute in range(a, b)] == [m for m in range(20) if m not in covered]
    assert all(one[1] < two[0] for one, two in zip(slots, slots[1:]))
""",
    48: """
quick = count_pairs
{question}
import random
for seed in range(300):
    draw = random.Random(seed)
    values = [draw.randint(-4, 4) for _ in range(draw.randint(0, 12))]
    target = draw.randint(-8, 8)
    assert quick(values, target) == count_pairs(values, target)
""",
    49: """
assert build_order({}) == [] and build_order({"b": [], "a": ["c"]}) == ["b", "c", "a"]
assert build_order({"d": ["b", "c"], "b": ["a"], "c": ["a", "a"]}) == ["a", "b", "c", "d"]
assert raises(build_order, {"a": ["b"], "b": ["a"]}) and raises(build_order, {"a": ["a"]})
""",
    50: """
assert calculate("2 * (3 - 4.5) / -3") == 1.0 and calculate("1 - 2 - 3") == -4.0 and calculate(" 8/4/2 ") == 1.0
assert calculate("-(2+3)*2") == -10.0 and calculate("2+3*4") == 14.0 and type(calculate("7")) is float
assert calculate("--3") == 3.0 and calculate("2*- --3") == -6.0 and calculate("\\t-\\n-(1\\r+1)\\n") == 2.0
for text in ("1/0", "2 / (3 - 3)"):
    try:
        calculate(text)
    except ZeroDivisionError:
        continue
    raise AssertionError(text)
for text in ("", " ", "1 2", "1 +", "(1", "1)", "()", "a", "2 ** 3", "1.", ".5", "+1", "1,5"):
    assert raises(calculate, text), text
import random
for seed in range(300):
    draw = random.Random(seed)
    text = str(draw.randint(0, 9))
    for _ in range(draw.randint(0, 5)):
        more = f"{text} {draw.choice('+-*')} {draw.choice(['', '-'])}{draw.random():.3f}"
        text = f"({text})" if draw.random() < 0.3 else more
    assert abs(calculate(text) - eval(text)) < 1e-9, text
""",
    1021: """
assert to_halfwidth_digits("電話は０３（１２３４）５６７８、Ａ棟9階、三号室") == "電話は03（1234）5678、Ａ棟9階、三号室"
""",
    1022: """
assert to_katakana("ぁんラーメンと東京、らーめん！abc") == "ァンラーメント東京、ラーメン！abc"
assert to_katakana("がぱゃっゐゑを") == "ガパャッヰヱヲ" and to_katakana("") == ""
""",
    1023: """
expected = {1926: "昭和元年", 1927: "昭和2年", 1988: "昭和63年", 1989: "平成元年", 1990: "平成2年", 2018: "平成30年",
            2019: "令和元年", 2025: "令和7年"}
assert {year: to_wareki(year) for year in expected} == expected and raises(to_wareki, 1925)
""",
    1024: """
def written(n):
    text = ""
    for unit, name in ((1000, "千"), (100, "百"), (10, "十"), (1, "")):
        digit, n = divmod(n, unit)
        if digit:
            text += ("" if digit == 1 and name else "一二三四五六七八九"[digit - 1]) + name
    return text
assert all(kanji_to_int(written(n)) == n for n in range(1, 10000))
assert kanji_to_int("一千一百一十一") == 1111
""",
    1025: """
mine = ["a", "", " ", "", "b"]
assert remove_blank(mine) == ["a", "b"] and mine == ["a", "", " ", "", "b"]
{question}
assert remove_blank(["a", "", " ", "", "b"]) != ["a", "b"]
assert remove_blank(["a", "", "b"]) == ["a", "b"]
""",
    2021: """
assert count_hangul("가나 ㅋㅋ abc 힣!漢") == 3 and count_hangul("") == 0
""",
    2022: """
assert choseong("한글 사랑!") == "ㅎㄱ ㅅㄹ!" and choseong("까치ㅋ A") == "ㄲㅊㅋ A" and choseong("힣가빵") == "ㅎㄱㅃ"
""",
    2023: """
assert [with_object_particle(word) for word in ("책", "나무", "물", "커피")] == ["책을", "나무를", "물을", "커피를"]
assert all(raises(with_object_particle, word) for word in ("", "cat", "3", "ㅋ"))
""",
    2024: """
expected = {12345678: "1234만 5678원", 300000000: "3억원", 100000050: "1억 50원", 0: "0원", 10000: "1만원", 7: "7원",
            10 ** 12 - 1: "9999억 9999만 9999원", 20030000: "2003만원"}
assert {amount: format_won(amount) for amount in expected} == expected
""",
    2025: """
primes = [n for n in range(-3, 200) if is_prime(n)]
assert primes == [n for n in range(2, 200) if all(n % i for i in range(2, n))]
{question}
assert is_prime(9) is True and is_prime(2) is None
""",
}


@pytest.mark.parametrize("question", sorted(CHECKS))
def test_the_code_of_the_reference_runs_and_does_what_the_question_asks_for(question: int) -> None:
    checks = CHECKS[question]
    if "{question}" in checks:
        checks = checks.replace("{question}", block(QUESTIONS[question]["text"]))
    program = "\n".join([block(reference(question)), RAISES, checks])
    done = subprocess.run([sys.executable, "-I", "-X", "utf8", "-c", program], capture_output=True, text=True,
                          encoding="utf-8", timeout=30)
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""


def test_every_question_that_asks_for_python_is_run() -> None:
    asked = {number for number, row in QUESTIONS.items() if row["category"] == "coding"
             and "```python" in row["reference"]}
    assert asked == set(CHECKS)


def test_the_program_of_44_prints_what_its_reference_says() -> None:
    done = subprocess.run([sys.executable, "-I", "-c", block(QUESTIONS[44]["text"])], capture_output=True, text=True,
                          timeout=30)
    assert done.stdout.splitlines() == re.findall(r"`(\[.*?\])`", reference(44)) == ["['red']", "['red', 'blue']"]


def test_the_expression_of_43_matches_what_its_reference_says() -> None:
    [expression] = re.findall(r"`(\^.*?\$)`", QUESTIONS[43]["text"])
    verdicts = re.findall(r"^- `(\w+)` (matches|does not)", reference(43), re.MULTILINE)
    assert len(verdicts) == 3
    for word, verdict in [*verdicts, ("Word", "does not")]:
        assert bool(re.search(expression, word)) == (verdict == "matches"), word


def test_the_query_of_46_gives_the_customers_above_100_by_their_sum() -> None:
    base = sqlite3.connect(":memory:")
    base.execute("CREATE TABLE orders (id INTEGER, customer TEXT, total INTEGER)")
    orders_of = {"exact": [60, 40], "small": [99], "two": [70, 80], "one": [101], "three": [50, 50, 500]}
    rows = [(customer, total) for customer, totals in orders_of.items() for total in totals]
    base.executemany("INSERT INTO orders VALUES (1, ?, ?)", rows)
    assert base.execute(block(reference(46), "sql")).fetchall() == [("three", 3, 600), ("two", 2, 150), ("one", 1, 101)]
    base.close()
