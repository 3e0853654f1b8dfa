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
_HOURS = tuple(f"{hour}:{minute}" for hour in range(8, 18) for minute in ("00", "15", "30", "45"))
_COMPLAINTS = (
    "a cough", "a sore throat", "back pain", "a headache", "a swollen ankle", "an itching rash", "stomach pain",
    "a painful ear", "dizziness", "a stiff neck", "a burnt hand", "trouble sleeping", "a blocked nose", "a sore knee",
)  # fmt: skip
_CALLERS = ("A man", "A woman", "A child", "A neighbour", "A student", "A driver", "A visitor", "A teacher")
_SINCE = ("since this morning", "since yesterday", "for two hours", "for three days", "for a week", "since lunch")

# Reply of the triage desk → what is told on the telephone.
_TRIAGE: Mapping[str, Sequence[str]] = {
    "CODE RED. Send an ambulance at once.": (
        "strong chest pain", "no feeling in one arm", "heavy bleeding", "great trouble breathing", "fits",
    ),
    "CODE AMBER. A doctor calls back within one hour.": (
        "a high fever", "a deep cut", "severe stomach pain", "a broken wrist", "a swollen face",
    ),
    "CODE GREEN. Offer a visit this week.": (
        "a lasting cough", "an itching rash", "a sore knee", "pain in one ear", "a stiff back",
    ),
    "CODE WHITE. Give advice by telephone.": (
        "a cold", "a small bruise", "dry skin", "a question about vitamins", "a mild headache",
    ),
}  # fmt: skip

# Reply of the county's front desk → what residents ask about.
_DESKS: Mapping[str, Sequence[str]] = {
    "DESK 1, Roads and Parking. Bring the car papers.": (
        "a parking permit", "a broken street lamp", "a hole in the road", "a lost parking ticket", "a new road sign",
    ),
    "DESK 2, Family and Schools. Bring the birth certificate.": (
        "a school place", "a child allowance", "the birth of a child", "a school bus", "a day nursery",
    ),
    "DESK 3, Homes and Building. Bring a plan of the house.": (
        "a garden wall", "a new roof", "a building permit", "a house number", "a noisy building site",
    ),
    "DESK 4, Water and Waste. Bring the last bill.": (
        "a water meter", "a missing waste bin", "a high water bill", "the removal of old furniture", "a blocked drain",
    ),
}  # fmt: skip

# Matter of a letter → working days until the answer.
_MATTERS: Mapping[str, int] = {
    "a late payment": 5, "a lost card": 2, "a change of address": 5, "a refund": 10, "an unpaid bill": 5,
    "a wrong invoice": 10, "a new contract": 20, "a complaint": 10, "a missing form": 5, "an old account": 20,
}  # fmt: skip


def _person(draw: random.Random) -> str:
    return f"{draw.choice(_TITLES)} {draw.choice(_NAMES)}"


def _note(draw: random.Random) -> tuple[str, str]:
    person, complaint, days = _person(draw), draw.choice(_COMPLAINTS), draw.randint(2, 9)
    age, pulse = draw.randint(18, 89), draw.randint(55, 110)
    prompt = f"Summarise the note. {person}, aged {age}, came with {complaint} for {days} days. The pulse is {pulse}."
    return prompt, f"PATIENT {person} | AGE {age} | COMPLAINT {complaint} | DAYS {days} | PULSE {pulse}"


def _triage(draw: random.Random) -> tuple[str, str]:
    reply = draw.choice(tuple(_TRIAGE))
    caller, sign, since = draw.choice(_CALLERS), draw.choice(_TRIAGE[reply]), draw.choice(_SINCE)
    hour = draw.choice(_HOURS)
    return f"Give the triage code. {caller} called at {hour} and has had {sign} {since}.", reply


def _visit(draw: random.Random) -> tuple[str, str]:
    person, day, hour = _person(draw), draw.choice(_DAYS), draw.choice(_HOURS)
    prompt = f"Confirm the visit. {person} would like to come on {day} at {hour}."
    return prompt, f"CONFIRMED: {person}, {day}, {hour}. Please come ten minutes early and bring your card."


def _letter(draw: random.Random) -> tuple[str, str]:
    person, matter = _person(draw), draw.choice(tuple(_MATTERS))
    days, number = _MATTERS[matter], draw.randint(100, 999)
    prompt = f"Begin a letter to {person} about {matter}. The file number is {number}."
    return (
        prompt,
        f"Dear {person}, re file {number}: thank you for your letter. You will have an answer in {days} days.",
    )


def _form(draw: random.Random) -> tuple[str, str]:
    person, day, amount = _person(draw), draw.choice(_DAYS), draw.randint(10, 99) * 10
    account = draw.randint(1000, 9999)
    prompt = f"Fill in the form. On {day} {person} wants to pay {amount} crowns into account {account}."
    return prompt, f"TO: {person}; ACCOUNT: {account}; AMOUNT: {amount}; DAY: {day}; STATUS: ready"


def _desk(draw: random.Random) -> tuple[str, str]:
    reply = draw.choice(tuple(_DESKS))
    person, subject, day = _person(draw), draw.choice(_DESKS[reply]), draw.choice(_DAYS)
    return f"Name the desk. On {day} {person} asked about {subject}.", reply


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
