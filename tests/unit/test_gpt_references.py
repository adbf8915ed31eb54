"""The references of the question sets are right where that can be computed: results, puzzles, lists, lengths."""
# ruff: noqa: RUF001 (Japanese texts have full-width signs)

from __future__ import annotations

import itertools
import json
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable
from fractions import Fraction
from typing import Any

import pytest

from tests.unit.test_gpt_sets import PER_CATEGORY, read

QUESTIONS = {row["question_id"]: row for name in PER_CATEGORY for row in read(name)}


def reference(question: int) -> str:
    return str(QUESTIONS[question]["reference"])


def answer_line(question: int) -> str:
    """What stands behind "Answer:" at the end of a reference."""
    match = re.search(r"^(?:Answer: |答え：|답: )(.+)\Z", reference(question), re.MULTILINE)
    assert match, f"the reference of {question} does not end with an answer"
    return match[1]


def block(text: str, language: str = "python") -> str:
    blocks = re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)
    assert len(blocks) == 1, f"{len(blocks)} blocks of {language}"
    return str(blocks[0])


# --- results ----------------------------------------------------------------------------------------------------------

def orders(names: Iterable[str], fits: Callable[..., bool]) -> list[tuple[str, ...]]:
    """The orders of `names` for which `fits` holds, given the position of each name."""
    names = list(names)
    return [order for order in itertools.permutations(names) if fits(*(order.index(name) for name in names))]


def only(found: Iterable[Any]) -> Any:
    """The one element; a puzzle with two solutions is a bad question."""
    [found] = list(found)
    return found


def honest(*statements: Callable[[tuple[bool, ...]], bool]) -> int:
    """The one who tells the truth, if each says a statement about who tells the truth."""
    found = only(truths for truths in itertools.product([True, False], repeat=len(statements))
                 if all(says(truths) == is_true for says, is_true in zip(statements, truths, strict=True)))
    return int(only(i for i, is_true in enumerate(found) if is_true))


def jug_steps() -> int:
    """Fewest steps from empty jugs of 5 and 8 litres to 2 litres in one of them."""
    reached, steps = {(0, 0)}, 0
    while not any(2 in jugs for jugs in reached):
        following = set(reached)
        for a, b in reached:
            over, back = min(a, 8 - b), min(b, 5 - a)
            following |= {(5, b), (a, 8), (0, b), (a, 0), (a - over, b + over), (a + back, b - back)}
        reached, steps = following, steps + 1
    return steps


def product_and_sum() -> tuple[int, int]:
    pairs = set(itertools.combinations_with_replacement(range(1, 10), 2))

    def known(pairs: set[tuple[int, int]], told: Callable[[tuple[int, int]], int]) -> set[tuple[int, int]]:
        times = Counter(told(pair) for pair in pairs)
        return {pair for pair in pairs if times[told(pair)] == 1}

    pairs -= known(pairs, math.prod)
    pairs -= known(pairs, sum)
    return only(known(pairs, math.prod))


def extremes() -> list[int]:
    """Smallest value, and where, largest value, and where, of the function of question 39, on a fine grid."""
    values = {Fraction(i, 100): Fraction(i, 100) ** 3 - 6 * Fraction(i, 100) ** 2 + 9 * Fraction(i, 100) + 2
              for i in range(501)}
    low, high = min(values.values()), max(values.values())
    return [low, *(x for x in values if values[x] == low), high, *(x for x in values if values[x] == high)]


RECTANGLE = only((a, b) for a in range(1, 23) for b in range(a, 23) if a + b == 23 and a * b == 120)
NUMBERS: dict[int, Callable[[], list[Any]]] = {
    23: lambda: [2 + 1, 10 + 2],
    29: lambda: [jug_steps()],
    30: lambda: list(product_and_sum()),
    31: lambda: [4 * Fraction("3.20") + 6 * Fraction("1.45")],
    32: lambda: [Fraction(15, 100) * 240, 240 / Fraction(15, 100)],
    33: lambda: [(13 * 60 + 12) - (9 * 60 + 47), Fraction(287 * 60, (13 * 60 + 12) - (9 * 60 + 47))],
    34: lambda: [next(n for n in itertools.count() if 5000 * Fraction(103, 100) ** n > 6000)],
    35: lambda: [*RECTANGLE, math.isqrt(RECTANGLE[0] ** 2 + RECTANGLE[1] ** 2)],
    36: lambda: [Fraction(sum(a + b in (2, 3, 5, 7, 11) for a in range(1, 7) for b in range(1, 7)), 36)],
    37: lambda: [sum(list(str(n)) == sorted(set(str(n))) for n in range(1000, 10000))],
    38: lambda: [7 ** 100 % 13],
    39: extremes,
    40: lambda: [sum(12 * a % (a - 12) == 0 and 12 * a // (a - 12) >= a for a in range(13, 157))],
    1016: lambda: [(1280 + 2 * 640) * Fraction(110, 100)],
    1017: lambda: only([24 - k, k] for k in range(25) if 2 * (24 - k) + 4 * k == 66),
    1018: lambda: [1800 // (80 + 70), 1800 // (80 - 70)],
    1019: lambda: [math.gcd(270, 360), 270 * 360 // math.gcd(270, 360) ** 2],
    1020: lambda: [sum(a != 0 and c % 2 == 0 for a, b, c in itertools.permutations(range(6), 3))],
    2013: lambda: [14 * 2 - (4 * 2 + 5 + 6 * 2), 14 * 2 - (4 + 6) * 2],
    2016: lambda: [24000 * 9 // 10 - 3000, (24000 - 3000) * 9 // 10, 3000 - 3000 * 9 // 10],
    2017: lambda: [Fraction(300 * 8, 500), 500 - Fraction(300 * 8, 6)],
    2018: lambda: [(1 - 4 * (Fraction(1, 12) + Fraction(1, 18))) * 18],
    2019: lambda: [round(84 / Fraction("3.3"), 1), 32 * Fraction("3.3")],
    2020: lambda: [len(orders("가나다라마", lambda a, b, c, d, e: abs(a - b) != 1))],
}


@pytest.mark.parametrize("question", sorted(NUMBERS))
def test_the_number_in_the_reference_is_what_the_computation_gives(question: int) -> None:
    line = re.sub(r"（\d）", "", answer_line(question))
    found = [Fraction(number) for number in re.findall(r"\d+(?:\.\d+|/\d+)?", line)]
    assert found == [Fraction(value) for value in NUMBERS[question]()]


def test_every_mathematical_question_is_computed() -> None:
    assert {number for number, row in QUESTIONS.items() if row["category"] == "math"} <= set(NUMBERS)


def owners() -> str:
    found = only(owner for owner in itertools.permutations(["cat", "dog", "parrot"])
                 if owner[0] == "parrot" and owner[2] != "dog")
    return "{} has the {}, {} the {}, {} the {}.".format(
        *itertools.chain.from_iterable(zip(["Kim", "Lee", "Mo"], found, strict=True)))


def departure() -> str:
    train = max(minute for minute in range(6 * 60, 9 * 60, 12) if minute + 25 + 5 <= 9 * 60)
    return {8 * 60 + 16: "八時十六分"}[train - 8]


def eater() -> str:
    """Which of the four ate, if exactly one statement is true."""
    return only(name for name in ("민수", "지영", "현우", "소라")
                if [name == "지영", name == "소라", name != "현우", name != "소라"].count(True) == 1)


def years() -> str:
    animals = ["쥐", "소", "호랑이", "토끼", "용", "뱀", "말", "양", "원숭이", "닭", "개", "돼지"]
    at = animals.index("용")
    return f"30년 뒤는 {animals[(at + 30) % 12]}의 해, 5년 전은 {animals[(at - 5) % 12]}의 해"


def floors() -> str:
    order = only(orders(["가람", "나리", "다솜", "라온", "마루"], lambda g, n, d, r, m:
                        d == g + 1 and m < g and r > d and n not in (0, 4) and abs(n - d) != 1))
    return ", ".join(f"{floor}층 {name}" for floor, name in enumerate(order, 1))


WORDS: dict[int, Callable[[], str]] = {
    21: lambda: only(orders(["Dan", "Carla", "Ben", "Anna"], lambda d, c, b, a: a > b > c > d))[1],
    22: lambda: ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"][6 - 2 - 1],
    25: owners,
    26: lambda: "PQR"[honest(lambda h: h.count(False) == 1, lambda h: h.count(False) == 2,
                             lambda h: h.count(False) == 3)] + " alone tells the truth.",
    27: lambda: ", ".join(only(orders("ABCDE", lambda a, b, c, d, e: c == a + 1 and b < d < a and b not in (0, 4)))),
    1011: lambda: "月火水木金土日"[(2 + 100) % 7] + "曜日",
    1012: lambda: "、".join(only(orders(["青木", "石井", "上田", "江藤", "大野"], lambda a, i, u, e, o:
                                      o != 4 and e == a + 1 and u == o - 1 and e < o))),
    1013: departure,
    1014: lambda: "一二三"[honest(lambda h: not h[1], lambda h: not h[2],
                               lambda h: not h[0] and not h[1])] + "郎だけ",
    2011: years,
    2012: floors,
    2014: eater,
}


@pytest.mark.parametrize("question", sorted(WORDS))
def test_a_puzzle_has_one_solution_and_the_reference_gives_it(question: int) -> None:
    assert answer_line(question) == WORDS[question]()


# --- what is taken from a text, and the limits that a question sets ---------------------------------------------------

@pytest.mark.parametrize("question", [52, 1026, 2026])
def test_a_reference_in_json_has_the_keys_that_the_question_names(question: int) -> None:
    found = json.loads(reference(question))
    request = QUESTIONS[question]["text"].split("\n\n")[0]
    named = [name for name in re.findall(r'[「"](.+?)[」"]', request) if ":" not in name]
    assert list(found) == named
    assert re.fullmatch(r"\d\d:\d\d", found.get("start") or found.get("開始") or found.get("시작"))


def test_the_lists_of_51_and_60_are_those_of_their_texts() -> None:
    assert reference(51).splitlines() == re.findall(r"[\w.+]+@[\w.]+\w", QUESTIONS[51]["text"])
    log = [line.split() for line in QUESTIONS[60]["text"].splitlines() if re.match(r"\d\d:", line)]
    expected = ["service,errors,first_error"]
    for service in sorted({line[1] for line in log}):
        errors = [line[0] for line in log if line[1] == service and line[2] == "ERROR"]
        expected.append(f"{service},{len(errors)},{errors[0] if errors else ''}")
    assert reference(60).splitlines() == expected


WORD_LIMITS = {3: (1, 120), 5: (50, 70), 7: (1, 25), 8: (100, 150), 15: (1, 80), 16: (1, 100), 17: (60, 120),
               18: (1, 90), 55: (1, 20)}
CHARACTER_LIMITS = {1003: 250, 1004: 150, 1005: 200, 1027: 40, 2003: 300, 2004: 200, 2005: 300, 2027: 50}


def test_references_keep_to_the_lengths_that_their_questions_set() -> None:
    for question, (least, most) in WORD_LIMITS.items():
        text = QUESTIONS[question]["text"]
        assert all(str(limit) in text for limit in (least, most) if limit > 1)
        assert least <= len(reference(question).split()) <= most, question
    for question, most in CHARACTER_LIMITS.items():
        assert len(reference(question)) <= most, question
    mail = reference(4).split("\n", 1)[1]
    assert len(mail.split()) <= 100


def test_references_keep_to_the_other_rules_that_their_questions_set() -> None:
    assert not re.search(r"\b(rain|wet)", reference(2), re.IGNORECASE)
    assert reference(3).endswith(" Nobody ever asked for the key again.")
    assert not re.search(r"!|\b(best|perfect|amazing)\b", reference(5), re.IGNORECASE)
    assert [line.split(":")[0] in ("Mara", "Joel") for line in reference(9).splitlines()] == [True] * 8
    lengths = [len(sentence.split()) for sentence in re.split(r"(?<=\.) ", reference(10))]
    assert len(lengths) == 5
    assert lengths == sorted(set(lengths))
    assert [len(re.findall(r"[.?!](?: |$)", voice)) for voice in reference(20).split("\n\n")] == [2, 2, 2]
    [reading] = re.findall(r"（(.+?／.+?／.+?)）", reference(1002))
    assert [len(re.sub("[ゃゅょ]", "", part)) for part in reading.split("／")] == [5, 7, 5]
    assert reference(1005).startswith("駅の忘れ物の棚に、一つだけ動き続けている時計があった。")
    assert [line[0] for line in reference(2002).splitlines()] == list("도서관")
    assert reference(2005).startswith("막차가 떠난 정류장에 우산 하나가 남아 있었다.")
