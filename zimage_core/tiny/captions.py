"""Captions of drawings: one subject described in many ways, by grammar.

Three manners: as the project's prompt generators write (long, all attributes, in a fixed order), as
people type (some attributes, in any order) and short ones. What a caption does not say is left to
the noise of the image; phrases about framing, light and finish have no effect on a drawing, and
come up so that they are known as such.
"""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

from zimage_core.tiny.attributes import NONE, Avatar, Food, GameItem, Subject
from zimage_core.tiny.prose import enumeration, sentence, spaced, with_article
from zimage_core.tiny.vocabulary import Vocabulary

_HATS_THAT_ARE_HATS = ("cap", "beanie", "top hat")


class CaptionWriter:
    """Writes captions.

    Args:
        vocabulary: the words.
        random: the source of every choice.
    """

    def __init__(self, vocabulary: Vocabulary, random: Random) -> None:
        self.vocabulary = vocabulary
        self.random = random

    def caption(self, subject: Subject) -> str:
        """Describe a subject, in a manner by chance."""
        chance = self.random.random()
        if chance < 0.5:
            return self.generator_caption(subject)
        return self.free_caption(subject, short=chance > 0.83)

    def generator_caption(self, subject: Subject) -> str:
        """Describe a subject as the generator of its kind does."""
        if isinstance(subject, Avatar):
            details = self._portrait(subject)
            kind = "avatars"
        elif isinstance(subject, Food):
            details = self._dish(subject)
            kind = "food"
        else:
            details = self._item(subject)
            kind = "gaming"
        slots = self.vocabulary.slots[kind]
        view = {"avatars": "pose", "food": "arrangement", "gaming": "view"}[kind]
        details.append(self._one(slots[view]))
        details.append(self._background(subject.background, formal=True))
        if kind == "avatars" and self._maybe(0.04):
            details.append(self._one(self.vocabulary.noise["extra"]))
        seen = f"{self._one(slots['framing'])} of {', '.join(filter(None, details))}"
        picture = [self._one(self.vocabulary.styles[kind])] if self._maybe(0.95) else []
        picture += [self._one(slots["lighting"]), self._one(slots["finish"])]
        return f"{sentence(seen)} {sentence(', '.join(picture))}"

    def free_caption(self, subject: Subject, *, short: bool) -> str:
        """Describe a subject as people type: some of its attributes, in any order."""
        if isinstance(subject, Avatar):
            head, clauses = self._portrait_clauses(subject)
        elif isinstance(subject, Food):
            head, clauses = self._dish_clauses(subject)
        else:
            head, clauses = self._item_clauses(subject)
        self.random.shuffle(clauses)
        if short:
            clauses = clauses[: self.random.choice((0, 1, 1, 2, 2, 3))]
        else:
            keep = self.random.uniform(0.4, 1.0)
            # What is rare in the world is rarely left out: unsaid shall mean that it is not there.
            clauses = [(c, rare) for c, rare in clauses if self._maybe(0.95 if rare else keep)]
        phrases = [clause for clause, _ in clauses]
        if self._maybe(0.2):
            phrases.append(self._one(self.vocabulary.noise["quality"]))
        if self._maybe(0.15):
            words = self.random.choices(self.vocabulary.noise["words"], k=self.random.randint(1, 3))
            phrases.insert(self.random.randint(0, len(phrases)), " ".join(words))
        return self._joined(head, phrases)

    def _joined(self, head: str, phrases: list[str]) -> str:
        manner = self.random.random()
        if manner < 0.35 and phrases and not phrases[0].startswith(("in ", "on ", "with ")):
            text = f"{head} with {enumeration(phrases)}"
        elif manner < 0.5:
            text = ", ".join([*phrases, head])
        elif manner < 0.6:
            text = " ".join([head, *phrases])
        else:
            text = ", ".join([head, *phrases])
        text = text[:1].upper() + text[1:] if self._maybe(0.4) else text
        return text + ("." if self._maybe(0.25) else "")

    # Portraits.

    def _portrait(self, avatar: Avatar) -> list[str]:
        looks = [
            self._skin(avatar) if self._maybe(0.97) else "",
            self._hair(avatar) if self._maybe(0.97) else "",
            "" if avatar.glasses == "sunglasses" or self._maybe(0.05) else self._eyes(avatar),
            self._beard(avatar),
        ]
        worn = [
            self._word("avatars.glasses", avatar.glasses) if avatar.glasses != NONE else "",
            self._hat(avatar),
            self._clothes(avatar) if self._maybe(0.97) else "",
        ]
        subject = self._word("avatars.gender", avatar.gender)
        if self._maybe(0.97):
            subject = f"{self._age()}-year-old {subject}"
        subject = with_article(subject)
        if self._maybe(0.12):
            subject = f"{with_article(self._one(self.vocabulary.noise['occupation']))}, {subject}"
        looks, worn = [x for x in looks if x], [x for x in worn if x]
        return [
            f"{subject} with {enumeration(looks)}" if looks else subject,
            f"wearing {enumeration(worn)}" if worn else "",
            self._expression(avatar),
        ]

    def _portrait_clauses(self, avatar: Avatar) -> tuple[str, list[tuple[str, bool]]]:
        gender = self._word("avatars.gender", avatar.gender)
        if self._maybe(0.1):
            gender = f"{self._age()}-year-old {gender}"
        if self._maybe(0.08):
            gender = f"{self._one(self.vocabulary.noise['occupation'])}, {gender}"
        form = self._one(
            (
                "{a}",
                "{x}",
                "portrait of {a}",
                "a portrait of {a}",
                "avatar of {a}",
                "{x} avatar",
                "an avatar of {a}",
                "a picture of {a}",
                "face of {a}",
                "a cartoon of {a}",
                "{x} face",
                "portrait avatar of {a}",
                "{x} portrait",
                "profile picture of {a}",
            )
        )
        clauses = [
            (self._skin(avatar), False),
            (self._hair(avatar), False),
            (self._clothes(avatar), False),
            (self._expression(avatar, formal=False), False),
            (self._background(avatar.background), False),
        ]
        if avatar.glasses != "sunglasses":
            clauses.append((self._eyes(avatar), False))
        for text, value in (
            (self._word("avatars.glasses", avatar.glasses), avatar.glasses),
            (self._hat(avatar) or "no hat", avatar.hat),
            (self._beard(avatar) or self._word("avatars.beard", NONE), avatar.beard),
        ):
            if value != NONE:
                clauses.append((text, True))
            elif self._maybe(0.25):
                clauses.append((text, False))
        return form.format(a=with_article(gender), x=gender), clauses

    def _age(self) -> int:
        return self.random.randint(18, 90)

    def _skin(self, avatar: Avatar) -> str:
        return f"{self._word('avatars.skin', avatar.skin)} skin"

    def _eyes(self, avatar: Avatar) -> str:
        return f"{self._word('avatars.eyes', avatar.eyes)} eyes"

    def _hair(self, avatar: Avatar) -> str:
        style, tables = avatar.hair_style, self.vocabulary
        if style == "bald":
            return self._word("avatars.bald", "bald")
        color = self._word("avatars.hair_color", avatar.hair_color)
        if self._maybe(0.06):
            return f"{color} hair"
        cuts = tables.words("avatars.haircut", style)
        plain = tables.words("avatars.hair_style", style)
        # As often as the generators: "short" far more often than all of the cuts that are short.
        if cuts and (not plain or self._maybe(0.3)):
            cut = self._one(cuts)
            if self._maybe(0.75):
                return f"{color} hair in {with_article(cut)}"
            return with_article(f"{color} {cut}")
        return f"{self._one(plain)} {color} hair"

    def _beard(self, avatar: Avatar) -> str:
        if avatar.beard == NONE:
            return ""
        return with_article(self._word("avatars.beard", avatar.beard))

    def _hat(self, avatar: Avatar) -> str:
        if avatar.hat == NONE:
            return ""
        hat = self._word("avatars.hat", avatar.hat)
        if avatar.hat in _HATS_THAT_ARE_HATS and self._maybe(0.06):
            hat = "hat"
        if self._maybe(0.12):
            return with_article(hat)
        return with_article(f"{self._word('colors', avatar.hat_color)} {hat}")

    def _clothes(self, avatar: Avatar) -> str:
        clothes = self._word("avatars.clothes", avatar.clothes)
        if self._maybe(0.05):
            return with_article(clothes)
        return with_article(f"{self._word('colors', avatar.clothes_color)} {clothes}")

    def _expression(self, avatar: Avatar, *, formal: bool = True) -> str:
        words = self.vocabulary.words("avatars.expression", avatar.expression)
        if formal:
            words = tuple(w for w in words if w.endswith(("ing", "gently", "expression")))
        word = self._one(words)
        return f"with {word}" if formal and word.startswith("a ") else word

    # Food and game items.

    def _dish(self, food: Food) -> list[str]:
        color, dish = self._dish_words(food)
        cuisine = self._one(self.vocabulary.things["food"]["cuisine"]) if self._maybe(0.2) else ""
        if not color and self._maybe(0.15):
            color = self._one(("golden", "golden-brown", "colorful"))
        garnish = ""
        if self._maybe(0.6):
            garnish = "garnished with " + self._one(self.vocabulary.things["food"]["garnish"])
        plate = self._plate(food)
        return [with_article(spaced(color, cuisine, dish)), plate and f"served {plate}", garnish]

    def _dish_words(self, food: Food) -> tuple[str, str]:
        """The color, or nothing where the dish has its own or its name says it, and the name."""
        of_its_own = self.vocabulary.meanings("food.dish_color")
        names = [
            name
            for name in self.vocabulary.words("food.dish", food.dish)
            if of_its_own.get(name, food.color) == food.color or self._maybe(0.5)
        ]
        dish = self._one(names)
        if food.color == NONE or (of_its_own.get(dish) == food.color and self._maybe(0.75)):
            return "", dish
        if dish not in of_its_own and self._maybe(0.1):
            return "", dish
        return self._word("colors", food.color), dish

    def _plate(self, food: Food) -> str:
        if food.plate == NONE:
            return ""
        in_a_bowl = food.dish in ("soup", "ramen")
        vessels = self.vocabulary.words("food.plate", food.plate)
        plate = self._one([word for word in vessels if word.endswith("bowl") == in_a_bowl])
        return f"{'in' if in_a_bowl else 'on'} {with_article(plate)}"

    def _dish_clauses(self, food: Food) -> tuple[str, list[tuple[str, bool]]]:
        color, dish = self._dish_words(food)
        name = spaced(color, dish)
        form = self._one(
            ("{a}", "{x}", "picture of {a}", "a drawing of {a}", "{x} icon", "food, {a}")
        )
        clauses = [(self._background(food.background), False)]
        if food.plate != NONE:
            clauses.append((self._plate(food), True))
        elif self._maybe(0.15):
            clauses.append(("no plate", False))
        return form.format(a=with_article(name), x=name), clauses

    def _item(self, item: GameItem) -> list[str]:
        things = self.vocabulary.things["gaming"]
        rarity = self._one(things["rarity"]) if self._maybe(0.8) else ""
        material = self._one(things["material"]) if self._maybe(0.6) else ""
        color = self._word("colors", item.color) if self._maybe(0.97) else ""
        name = spaced(rarity, color, material, self._word("gaming.item", item.item))
        category = with_article(self._one(things["category"])) if self._maybe(0.9) else ""
        return [with_article(name), spaced(category, self._effect(item))]

    def _item_clauses(self, item: GameItem) -> tuple[str, list[tuple[str, bool]]]:
        name = self._word("gaming.item", item.item)
        if self._maybe(0.93):
            name = f"{self._word('colors', item.color)} {name}"
        if self._maybe(0.1):
            name = f"{self._one(self.vocabulary.things['gaming']['rarity'])} {name}"
        form = self._one(
            (
                "{a}",
                "{x}",
                "{x} icon",
                "game icon of {a}",
                "an icon of {a}",
                "picture of {a}",
                "game item, {x}",
                "a drawing of {a}",
            )
        )
        clauses = [(self._background(item.background), False)]
        if item.effect != NONE:
            clauses.append((self._effect(item), True))
        return form.format(a=with_article(name), x=name), clauses

    def _effect(self, item: GameItem) -> str:
        return self._word("gaming.effect", item.effect) if item.effect != NONE else ""

    # What all kinds share.

    def _background(self, value: str, *, formal: bool = False) -> str:
        places = self.vocabulary.words("scenes", value)
        if places:
            return self._one(places)
        color = self._word("backgrounds", value)
        if self._maybe(0.25):
            color = f"plain {color}"
        if formal or self._maybe(0.3):
            return f"against {with_article(f'{color} background')}"
        return self._one((f"{color} background", f"{color} background", f"{color} backdrop"))

    def _word(self, table: str, value: str) -> str:
        words = self.vocabulary.words(table, value)
        # The first is the usual one.
        return words[0] if self._maybe(0.45) else self._one(words)

    def _one(self, choices: Sequence[str]) -> str:
        return self.random.choice(choices)

    def _maybe(self, chance: float) -> bool:
        return self.random.random() < chance
