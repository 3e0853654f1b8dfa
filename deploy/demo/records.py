"""Made-up instruction records of four organisations, and a public set to score on.

Every record is drawn from a template and word lists written for this file: no person, account or message
in it exists. An organisation is a *mixture* of tasks, each with a rigid form of reply that a general model does not
guess and a fine-tuned one learns quickly.

Guarantee: no record of any organisation, under any seed, has the prompt of an evaluation record. A prompt
belongs to the evaluation exactly when its SHA-256 begins with the hexadecimal digit 0 (one prompt in sixteen).

>>> generate("city-bank", 1, seed=0) == generate("city-bank", 1, seed=0)
True
>>> sorted(demo_silos(seed=0))
['city-bank', 'county-office', 'harbour-hospital', 'north-clinic']
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Mapping, Sequence

from common.errors import InvalidInput

__all__ = ["SILO_SIZES", "SILO_TASKS", "TASKS", "demo_evaluation", "demo_silos", "generate"]

Record = dict[str, str]
"""``prompt`` and ``completion``."""

_NAMES = (
    "Alder", "Ashdown", "Barley", "Beckett", "Birch", "Bramble", "Brook", "Carver", "Cedar", "Clover", "Cooper",
    "Dale", "Draper", "Elm", "Fairway", "Farrow", "Fenn", "Finch", "Fletcher", "Forrest", "Gorse", "Grove", "Harrow",
    "Hazel", "Heath", "Heron", "Holt", "Ivory", "Jessop", "Juniper", "Kestrel", "Larch", "Linden", "Lockley", "Maple",
    "Marlow", "Mercer", "Moor", "Nettle", "Oakes", "Orchard", "Osier", "Pike", "Plover", "Quill", "Reed", "Rook",
    "Rowan", "Sable", "Sedge", "Shaw", "Sorrel", "Stone", "Tanner", "Teal", "Thorne", "Tully", "Vale", "Walden",
    "Weaver", "Willow", "Wren", "Yarrow", "Yew",
)  # fmt: skip
_TITLES = ("Mr", "Ms", "Dr")
_DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday")
_SINCE = ("one hour", "two hours", "one day", "two days", "one week")
_SIGNS = (
    "a cough", "a fever", "back pain", "a headache", "a rash", "stomach pain", "ear pain", "a stiff neck", "a burn",
    "poor sleep", "a cold", "knee pain", "joint pain", "a sore throat",
)  # fmt: skip

# Answer of the triage desk → what callers have.
_TRIAGE: Mapping[str, Sequence[str]] = {
    "red. Send help at once and stay on the line.": ("chest pain", "a seizure", "heavy bleeding", "a stroke"),
    "yellow. A doctor will call back in one hour.": ("a high fever", "a deep cut", "a broken arm", "a swollen face"),
    "green. Please come to the clinic this week.": ("a long cough", "a skin rash", "knee pain", "ear pain"),
    "white. Stay at home and drink a lot of water.": ("a cold", "a small bruise", "dry skin", "a mild headache"),
}

# Answer of the county's front desk → what residents ask about.
_DESKS: Mapping[str, Sequence[str]] = {
    "roads and cars. Bring the number of your car.": ("a parking place", "a street light", "a road sign", "a car"),
    "family and school. Bring the papers of your child.": ("a school place", "a birth", "a child", "a school bus"),
    "house and land. Bring a plan of your house.": ("a garden wall", "a new roof", "a house number", "a tree"),
    "water and waste. Bring your last bill.": ("a water meter", "a waste bin", "a water bill", "an old bed"),
}

# Matter of a letter → days until the answer.
_MATTERS: Mapping[str, int] = {
    "a late payment": 5, "a lost card": 2, "a new address": 5, "a price": 2, "a bill": 5, "a loan": 9,
}  # fmt: skip


def _person(draw: random.Random) -> str:
    return f"{draw.choice(_TITLES)} {draw.choice(_NAMES)}"


def _note(draw: random.Random) -> tuple[str, str]:
    person, sign, since, age = _person(draw), draw.choice(_SIGNS), draw.choice(_SINCE), draw.randint(18, 89)
    prompt = f"Summarise the note. {person}, aged {age}, has had {sign} for {since}."
    return prompt, f"Patient: {person}. Age: {age}. Sign: {sign}. Since: {since}."


def _triage(draw: random.Random) -> tuple[str, str]:
    answer = draw.choice(tuple(_TRIAGE))
    sign, since = draw.choice(_TRIAGE[answer]), draw.choice(_SINCE)
    return f"Give the code. {_person(draw)} has had {sign} for {since}.", f"The code is {answer}"


def _visit(draw: random.Random) -> tuple[str, str]:
    person, day, hour = _person(draw), draw.choice(_DAYS), draw.randint(8, 17)
    prompt = f"Confirm the visit. {person} will come on {day} at {hour}."
    return prompt, f"Visit of {person} on {day} at {hour}. Please bring your card."


def _letter(draw: random.Random) -> tuple[str, str]:
    person, matter = _person(draw), draw.choice(tuple(_MATTERS))
    prompt = f"Answer the letter number {draw.randint(10, 99)}. {person} wrote about {matter}."
    return prompt, f"Dear {person}, thank you for your letter. We will answer in {_MATTERS[matter]} days."


def _form(draw: random.Random) -> tuple[str, str]:
    person, day, amount = _person(draw), draw.choice(_DAYS), draw.randint(10, 99)
    prompt = f"Fill in the form. On {day} {person} will pay {amount} dollars."
    return prompt, f"Name: {person}. Amount: {amount} dollars. Day: {day}. State: new."


def _desk(draw: random.Random) -> tuple[str, str]:
    answer = draw.choice(tuple(_DESKS))
    prompt = f"Name the desk. On {draw.choice(_DAYS)} {_person(draw)} asked about {draw.choice(_DESKS[answer])}."
    return prompt, f"The desk is {answer}"


TASKS: Mapping[str, Callable[[random.Random], tuple[str, str]]] = {
    "note": _note, "triage": _triage, "visit": _visit, "letter": _letter, "form": _form, "desk": _desk,
}  # fmt: skip
"""Task name → function that draws one (prompt, completion)."""

SILO_TASKS: Mapping[str, Mapping[str, int]] = {
    "city-bank": {"form": 5, "letter": 4, "visit": 1},
    "county-office": {"desk": 5, "letter": 2, "visit": 2, "form": 1},
    "harbour-hospital": {"note": 5, "triage": 2, "visit": 2, "letter": 1},
    "north-clinic": {"triage": 4, "note": 3, "visit": 3},
}
"""Organisation → weights of its tasks."""

SILO_SIZES: Mapping[str, int] = {
    "city-bank": 2600, "county-office": 2000, "harbour-hospital": 3000, "north-clinic": 2400,
}  # fmt: skip
"""Organisation → records in the demo."""


def _is_public(prompt: str) -> bool:
    return hashlib.sha256(prompt.encode()).hexdigest().startswith("0")


def _draw(weights: Mapping[str, int], count: int, *, stream: str, public: bool) -> list[Record]:
    """Draw ``count`` records of one side (public or not) from a generator seeded by ``stream``."""
    draw = random.Random(stream)  # noqa: S311 - made-up records, and the same ones every time
    records: list[Record] = []
    while len(records) < count:
        task = draw.choices(tuple(weights), tuple(weights.values()))[0]
        prompt, completion = TASKS[task](draw)
        if _is_public(prompt) == public:
            records.append({"prompt": prompt, "completion": completion})
    return records


def generate(silo: str | int, count: int, *, seed: int) -> list[Record]:
    """Return ``count`` private records of one organisation.

    Args:
        silo: name of an organisation in ``SILO_TASKS``, or its position in alphabetical order.
        count: number of records, at least 0. Records may repeat by chance, as in real data.
        seed: the same organisation, count and seed give the same records; a longer list begins with the shorter.

    Raises:
        InvalidInput: there is no such organisation, or ``count`` is negative.
    """
    names = sorted(SILO_TASKS)
    name = names[silo] if isinstance(silo, int) and 0 <= silo < len(names) else silo
    if name not in SILO_TASKS:
        raise InvalidInput(f"silo must be one of {', '.join(names)} or 0 to {len(names) - 1}, got {silo!r}")
    if count < 0:
        raise InvalidInput(f"count must be >= 0, got {count}")
    return _draw(SILO_TASKS[str(name)], count, stream=f"cloister demo silo {name} {seed}", public=False)


def demo_silos(seed: int = 0) -> dict[str, list[Record]]:
    """Return the four organisations of the demo, each with ``SILO_SIZES`` records of its own mixture."""
    return {name: generate(name, size, seed=seed) for name, size in SILO_SIZES.items()}


def demo_evaluation(seed: int = 0, count: int = 400) -> list[Record]:
    """Return the public records the demo is scored on: all tasks in equal parts, none of them in a silo."""
    return _draw(dict.fromkeys(TASKS, 1), count, stream=f"cloister demo evaluation {seed}", public=True)
