"""Makes what is in data/profiles: `python -m tests.prompt_generators.make_profiles`.

Everything in it is invented. The same code gives the same tables, byte for byte: only
`random.Random.random` is used, which Python keeps stable, and the XLSX files' times are fixed. The
pictures to edit are drawings of the tiny checkpoint's world.
"""

from __future__ import annotations

import csv
import datetime
import io
import random
import re
import sys
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import openpyxl
from PIL import Image

from zimage_core.tiny.attributes import make_subject
from zimage_core.tiny.world import draw

Row = dict[str, Any]
FOLDER = Path("data/profiles")
FIXED_TIME = datetime.datetime(2026, 1, 1)

FIRST_AND_LAST_NAMES = [
    (
        "Ana Lucía Zoë Maja Åsa Noémie Jürgen Søren Mateo Łukasz",
        "García Müller Øberg Dvořák Šimić Peña",
    ),
    ("Анна Мария Олег Дмитро Елена Борис", "Иванова Шевченко Петров Коваль"),
    ("Ελένη Γιώργος Μαρία Νίκος", "Παπαδοπούλου Νικολάου Δήμου"),
    ("فاطمة أحمد ليلى يوسف مريم", "الخطيب حداد منصور"),
    ("नीता अर्जुन मीरा रोहन", "शर्मा पटेल राव"),
    ("서연 민준 지우 하은", "김 이 박"),
    ("陽菜 蓮 さくら 大翔", "佐藤 鈴木 髙橋"),
    ("伟 芳 秀英 强", "王 李 张"),
    ("Amara Kwame Zuri Thabo Wanjirũ", "Okafor Mensah Ndlovu Mwangi"),
]


class Dice:
    """Choices from one seeded stream."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed).random

    def pick(self, values: Sequence[Any]) -> Any:
        """One of the values."""
        return values[int(self._random() * len(values))]

    def maybe(self, chance: float, values: Sequence[Any]) -> Any:
        """One of the values by chance, else None: an empty cell."""
        return self.pick(values) if self._random() < chance else None

    def whole(self, least: int, most: int) -> int:
        """An int from least to most."""
        return least + int(self._random() * (most - least + 1))

    def name(self) -> str:
        """A first and a last name of one script."""
        first, last = self.pick(FIRST_AND_LAST_NAMES)
        return f"{self.pick(first.split())} {self.pick(last.split())}"

    def date(self, year: int) -> datetime.date:
        """A day of that year or one of the five after it."""
        return datetime.date(year, 1, 1) + datetime.timedelta(days=self.whole(0, 2190))


def person(dice: Dice, number: int) -> Row:
    """A row of avatars."""
    gender = dice.pick(["woman", "woman", "woman", "man", "man", "man", "person"])
    return {
        "id": f"{number:04}",
        "name": dice.name(),
        "age": dice.maybe(0.9, range(18, 88)),
        "gender": gender,
        "skin_tone": dice.maybe(
            0.8, ["fair", "light", "olive", "tan", "light brown", "brown", "dark brown"]
        ),
        "hair_style": dice.maybe(0.8, ["short", "long", "curly", "bun", "bob", "braids", "afro"]),
        "hair_color": dice.maybe(0.7, ["black", "brown", "blonde", "red", "gray", "white", "blue"]),
        "eye_color": dice.maybe(0.4, ["brown", "green", "blue", "hazel"]),
        "glasses": dice.maybe(0.6, ["none", "none", "round", "square", "sunglasses"]),
        "hat": dice.maybe(0.5, ["none", "none", "red cap", "blue beanie", "headphones", "top hat"]),
        "beard": dice.maybe(0.5, ["none", "short", "mustache"]) if gender == "man" else None,
        "expression": dice.maybe(0.6, ["smiling", "neutral", "laughing", "surprised", "sad"]),
        "clothes": dice.maybe(0.6, ["sweater", "hoodie", "shirt", "t-shirt", "blazer", "overalls"]),
        "clothes_color": dice.maybe(0.7, ["red", "blue", "green", "yellow", "black", "purple"]),
        "background": dice.maybe(0.5, ["plain blue", "yellow", "teal", "pink", "in a sunny park"]),
        "occupation": dice.maybe(0.2, ["nurse", "teacher", "chef", "engineer", "gardener"]),
        "style": dice.maybe(0.3, ["flat illustration", "cartoon style", "photograph"]),
        "extra": dice.maybe(0.05, ["with a small gold earring", "holding a cup of tea"]),
        "postcode": f"{dice.whole(0, 99999):05}",
        "visits": dice.maybe(0.8, range(400)),
        "rating": dice.whole(2, 20) / 4,
        "newsletter": dice.pick([True, False]),
        "member_since": dice.date(2018),
    }


def staff(dice: Dice, number: int) -> Row:
    """A row of avatars for one studio look, with reserved columns."""
    return {
        "id": f"S{number:02}",
        "name": dice.name(),
        "age": dice.whole(21, 66),
        "gender": dice.pick(["woman", "man"]),
        "occupation": dice.pick(["director", "librarian", "electrician", "cook", "designer"]),
        "clothes": "shirt",
        "clothes_color": "white",
        "background": "plain light gray",
        "style": "studio photograph",
        "seed": 1000 + number,
        "width": 768,
        "height": 1024,
        "negative_prompt": "blurry, deformed",
    }


DISHES = {
    "donut": "ドーナツ",
    "cupcake": "кекс",
    "ice cream cone": "아이스크림",
    "apple": "सेब",
    "margherita pizza": "pizza Margherita",
    "burger": "汉堡",
    "sushi platter": "寿司",
    "ramen": "ラーメン",
    "tacos": "tacos",
    "pancakes": "crêpes épaisses",
    "fried egg": "τηγανητό αυγό",
    "tomato soup": "ντοματόσουπα",
    "chocolate cake": "Schokoladentorte",
    "macarons": "macarons",
    "borscht": "борщ",
}


def dish(dice: Dice, number: int) -> Row:
    """A row of food."""
    name = dice.pick(list(DISHES))
    soup = name in {"ramen", "tomato soup", "borscht"}
    sweet = name in {"donut", "cupcake", "ice cream cone", "macarons"}
    return {
        "id": number,
        "dish": name,
        "name_local": DISHES[name],
        "cuisine": None,
        "main_color": dice.maybe(0.7, ["pink", "yellow", "blue", "green"]) if sweet else None,
        "plate": dice.maybe(
            0.4, ["white bowl", "blue bowl"] if soup else ["white ceramic plate", "blue plate"]
        ),
        "garnish": dice.maybe(0.2, ["rainbow sprinkles", "a cherry"]) if sweet else None,
        "background": dice.maybe(0.4, ["plain white", "pastel pink", "on a rustic wooden table"]),
        "style": dice.maybe(0.3, ["food photography", "flat illustration", "cartoon style"]),
        "price": dice.whole(8, 90) / 4,
        "kcal": dice.maybe(0.85, range(60, 900)),
        "vegetarian": name not in {"burger", "sushi platter", "ramen", "tacos", "borscht"},
        "on_menu_since": dice.date(2020),
    }


def dessert(dice: Dice, number: int) -> Row:
    """A row of food in which every cell is filled."""
    return {
        "id": f"D{number:02}",
        "dish": dice.pick(["donut", "cupcake", "macarons", "chocolate cake", "ice cream cone"]),
        "main_color": dice.pick(["pink", "yellow", "mint-green", "white"]),
        "plate": "pink plate",
        "background": dice.pick(["sky blue", "plain white"]),
        "style": "flat illustration",
    }


ITEMS = ["sword", "shield", "potion", "gem", "coin", "heart", "slime", "game controller"]
ITEMS += ["staff", "helmet", "ring", "treasure chest", "key", "axe"]


def item(dice: Dice, number: int) -> Row:
    """A row of gaming."""
    kind = dice.pick(ITEMS)
    return {
        "id": f"{kind.replace(' ', '-')}-{number:03}",
        "item": kind,
        "name": dice.maybe(0.3, ["Éclair", "Dämmerung", "雷の剣", "Сумрак", "نور", "Ὀμφαλός"]),
        "category": None,
        "rarity": dice.pick(["common", "common", "uncommon", "rare", "epic", "legendary"]),
        "material": dice.maybe(0.2, ["crystal", "ancient"]),
        "color": dice.maybe(0.8, ["red", "blue", "green", "purple", "yellow", "white", "black"]),
        "effect": dice.maybe(
            0.5, ["none", "glowing softly", "wreathed in fire", "floating sparks"]
        ),
        "background": dice.maybe(0.4, ["plain dark", "plain white", "in a torch-lit dungeon"]),
        "style": dice.maybe(0.4, ["cartoon style", "pixel art", "3D render"]),
        "level": dice.maybe(0.9, range(1, 61)),
        "drop_rate": dice.whole(1, 400) / 1000,
        "tradable": dice.pick([True, True, False]),
        "released": dice.date(2019),
    }


def potion(dice: Dice, number: int) -> Row:
    """A row of gaming with reserved columns."""
    return {
        "id": f"P{number:02}",
        "item": "potion",
        "rarity": dice.pick(["common", "rare", "epic"]),
        "color": dice.pick(["red", "blue", "green", "purple"]),
        "background": "plain dark",
        "style": "pixel art",
        "seed": 500 + number,
        "width": 512,
        "height": 512,
    }


PERSON = {
    "background": "teal",
    "gender": "woman",
    "skin": "brown",
    "hair_style": "curly",
    "hair_color": "black",
    "eyes": "brown",
    "glasses": "none",
    "hat": "none",
    "hat_color": "none",
    "beard": "none",
    "expression": "smiling",
    "clothes": "sweater",
    "clothes_color": "yellow",
}
MAN = PERSON | {"gender": "man", "hair_style": "short", "background": "light blue"}

# For each picture the kind of drawing, what is in it, and what is asked of it.
EDITS: dict[str, tuple[str, dict[str, str], tuple[str, str]]] = {
    "curls": ("avatars", PERSON, ("make the background red", "add round glasses")),
    "cap": (
        "avatars",
        MAN | {"hat": "cap", "hat_color": "red", "clothes": "hoodie", "clothes_color": "blue"},
        ("remove the hat", "make the cap green"),
    ),
    "sunglasses": (
        "avatars",
        PERSON | {"hair_style": "bob", "hair_color": "pink", "glasses": "sunglasses"},
        ("remove the sunglasses", "make the hair blue"),
    ),
    "beard": (
        "avatars",
        MAN | {"skin": "light", "beard": "beard", "expression": "neutral", "background": "gray"},
        ("remove the beard", "add a black top hat"),
    ),
    "braids": (
        "avatars",
        PERSON | {"skin": "dark brown", "hair_style": "braids", "background": "park"},
        ("make the background white", "make them laughing"),
    ),
    "donut": (
        "food",
        {"background": "light blue", "dish": "donut", "color": "pink", "plate": "white"},
        ("make the donut brown", "remove the plate"),
    ),
    "apple": (
        "food",
        {"background": "white", "dish": "apple", "color": "red", "plate": "none"},
        ("make the apple green", "put it on a blue plate"),
    ),
    "soup": (
        "food",
        {"background": "orange", "dish": "soup", "color": "red", "plate": "white"},
        ("make the soup green", "put it on a table"),
    ),
    "cake": (
        "food",
        {"background": "pink", "dish": "cake", "color": "brown", "plate": "none"},
        ("make the background yellow", "make the cake white"),
    ),
    "sword": (
        "gaming",
        {"background": "dark", "item": "sword", "color": "blue", "effect": "none"},
        ("make the sword red", "set it on fire"),
    ),
    "potion": (
        "gaming",
        {"background": "purple", "item": "potion", "color": "green", "effect": "glow"},
        ("make the potion pink", "remove the glow"),
    ),
    "gem": (
        "gaming",
        {"background": "night", "item": "gem", "color": "red", "effect": "sparks"},
        ("make the background navy", "make the gem blue"),
    ),
}


def make_rows(make: Callable[[Dice, int], Row], seed: int, count: int) -> list[Row]:
    """`count` rows, numbered from 1."""
    dice = Dice(seed)
    return [make(dice, number) for number in range(1, count + 1)]


def make_tables() -> dict[str, dict[str, list[Row]]]:
    """For each file its sheets; the first one is also the CSV file."""
    return {
        "avatars": {"people": make_rows(person, 1, 200), "staff": make_rows(staff, 2, 24)},
        "food": {"menu": make_rows(dish, 3, 220), "desserts": make_rows(dessert, 4, 30)},
        "gaming": {"items": make_rows(item, 5, 240), "potions": make_rows(potion, 6, 16)},
    }


def make_edits() -> list[Row]:
    """Rows of pictures, below the folder `edit`, and of what is asked of each."""
    asked = [(name, text) for name, (_, _, texts) in EDITS.items() for text in texts]
    return [
        {"id": f"E{number:02}", "image": f"{name}.png", "instruction": text}
        for number, (name, text) in enumerate(asked, start=1)
    ]


def write_pictures(folder: Path) -> None:
    """Draw the pictures that the edits are asked of, 128 x 128 in 64 colors."""
    folder.mkdir(exist_ok=True)
    for name, (kind, values, _) in EDITS.items():
        picture = draw(make_subject(kind, values)).quantize(64, Image.Quantize.FASTOCTREE)
        picture.save(folder / f"{name}.png", optimize=True)


def write_csv(path: Path, rows: list[Row], *, bom: bool) -> None:
    """Write rows as UTF-8 with commas."""
    out = io.StringIO(newline="")
    writer = csv.DictWriter(out, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    path.write_bytes(out.getvalue().encode("utf-8-sig" if bom else "utf-8"))


def write_xlsx(path: Path, sheets: dict[str, list[Row]]) -> None:
    """Write a workbook whose last sheet is a note, with all times fixed."""
    book = openpyxl.Workbook()
    book.remove(book.active)
    for name, rows in sheets.items():
        sheet = book.create_sheet(name)
        sheet.append(list(rows[0]))
        for row in rows:
            sheet.append(list(row.values()))
        sheet.freeze_panes = "A2"
    note = book.create_sheet("README")
    note.append(["note"])
    note.append(["All rows are invented. Made for this project, CC0; see data/README.md."])
    note.append([f"The first sheet, {next(iter(sheets))!r}, is the one that is read by default."])
    packed = io.BytesIO()
    book.save(packed)
    with zipfile.ZipFile(packed) as source, zipfile.ZipFile(path, "w") as target:
        for entry in source.infolist():
            content = source.read(entry)
            if entry.filename == "docProps/core.xml":
                fixed = FIXED_TIME.strftime("%Y-%m-%dT%H:%M:%SZ").encode()
                content = re.sub(rb"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", fixed, content)
            info = zipfile.ZipInfo(entry.filename, FIXED_TIME.timetuple()[:6])
            info.compress_type = zipfile.ZIP_DEFLATED
            target.writestr(info, content)


def make(folder: Path) -> None:
    """Write all tables to the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, sheets in make_tables().items():
        write_csv(folder / f"{name}.csv", next(iter(sheets.values())), bom=name == "avatars")
        write_xlsx(folder / f"{name}.xlsx", sheets)
    write_csv(folder / "edit.csv", make_edits(), bom=False)
    write_pictures(folder / "edit")


if __name__ == "__main__":
    make(Path(sys.argv[1]) if len(sys.argv) > 1 else FOLDER)
