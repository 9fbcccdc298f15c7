"""Whether replies agree with their speaker's persona or contradict it."""

import re
from dataclasses import dataclass
from functools import cache

from arplus.data.personas import ABROAD, CITIES, SLANG, Kind, Persona, askable, split_place
from arplus.sums import Sums

_CORES: dict[Kind, tuple[str, ...]] = {
    "location": ("哪里人", "你家在哪", "哪个城市", "老家是哪"),
    "gender": ("男生还是女生", "男的还是女的", "是男是女", "汉子还是妹子"),
    "hobby": ("什么爱好", "爱好是什么", "喜欢什么", "什么感兴趣", "你的兴趣"),
}


@dataclass
class PersonaMetrics(Sums):
    """Replies against the personas of those who give them."""

    questions: int = 0
    """Examples that ask for something that the responder's profile has."""
    agreeing: int = 0
    """Replies to these that answer as the profile would."""
    agreeing_when_shuffled: int = 0
    """The same when the model is given another example's persona: what agrees by chance."""
    claims: int = 0
    """Replies, to whatever, that say of the speaker what the profile can confirm or deny."""
    contradicting: int = 0
    """Those of them that the profile denies."""
    reference_claims: int = 0
    """Claims of the reference replies."""
    reference_contradicting: int = 0
    """Those of them that the profile denies: people's own profiles are not always true, nor is the rule."""
    shuffled: int = 0
    """Questions that were also asked under another example's persona."""

    def add_answer(self, question: str, persona: Persona, reply: str, reply_when_shuffled: str | None) -> None:
        """Adds the replies to a question that :func:`asks` is true of; None where there was no other persona."""
        kind = persona_question(question)
        assert kind is not None
        self.questions += 1
        self.agreeing += agrees(kind, reply, persona)
        if reply_when_shuffled is not None:
            self.shuffled += 1
            self.agreeing_when_shuffled += agrees(kind, reply_when_shuffled, persona)

    def add(self, question: str, persona: Persona, reply: str, reference: str) -> None:
        """Adds any reply and its reference."""
        for text, claims, contradicting in (
            (reply, "claims", "contradicting"),
            (reference, "reference_claims", "reference_contradicting"),
        ):
            denied = contradicts(text, persona, question)
            if denied is not None:
                setattr(self, claims, getattr(self, claims) + 1)
                setattr(self, contradicting, getattr(self, contradicting) + denied)

    def result(self) -> dict[str, float]:
        """Numbers of questions and claims and, where there are any, shares of them."""
        found: dict[str, float] = {"questions": self.questions}
        if self.questions:
            found["agreement"] = self.agreeing / self.questions
        if self.shuffled:
            found["agreement_with_shuffled_personas"] = self.agreeing_when_shuffled / self.shuffled
        found["claims"] = self.claims
        if self.claims:
            found["contradiction"] = self.contradicting / self.claims
        if self.reference_claims:
            found["contradiction_of_references"] = self.reference_contradicting / self.reference_claims
        return found


def asks(question: str, persona: Persona) -> bool:
    """Whether the utterance asks for something that the persona has."""
    return persona_question(question) in askable(persona)


def persona_question(utterance: str) -> Kind | None:
    """What the utterance (with or without spaces) asks of the other's persona; None where it asks nothing of it."""
    text = "".join(utterance.split())
    return next((kind for kind, cores in _CORES.items() if any(core in text for core in cores)), None)


@cache
def _places() -> frozenset[str]:
    return frozenset([*CITIES, *ABROAD, *" ".join(CITIES.values()).split()])


def agrees(kind: Kind, reply: str, persona: Persona) -> bool:
    """Whether the reply (with or without spaces) answers the question of this kind as the persona would.

    A place agrees when the reply names the province, city or country and no other place that we know; a gender when
    it names this one and not the other; a hobby when it names one of the tags.
    """
    text = "".join(reply.split())
    if kind == "location":
        parts = split_place(persona.location)
        own = {part for part in parts if part}
        # 陕西安康 does not name 西安: what spells out the persona's own place names no other one.
        rest = text.replace("".join(parts), " ") if own else text
        return any(name in text for name in own) and not any(name in rest for name in _places() - own)
    if kind == "gender":
        named = {sex for sex, slang in SLANG.items() if sex in text or slang in text}
        return named == {persona.gender}
    return any(tag in text for tag in persona.tags)


_GENDER_CLAIM = re.compile("我(?:就|也|真|当然)?是(?:个|一个|一枚)?(男|女|汉子|妹子)(?!朋友|友|票|神|儿)")
_PLACE_CLAIM = re.compile("我(?:们)?(?:家|老家)?(?:就|也)?(?:是|在|住在|住)(?=(.*))")


def contradicts(reply: str, persona: Persona, question: str = "") -> bool | None:
    """Whether the reply says of its speaker what the profile denies; None where it says nothing that can be told.

    A simple rule, for real data. A reply claims a gender when it says 我是男… or 我是女… (or 汉子, 妹子), or names
    one in answer to a question for it; a place when it says 我是, 我在, 我家在 … and a place that we know comes next,
    or names places in answer to a question for it. A claim is denied when the profile has the other gender, or when it
    has a place and none of the named ones is it, its province, or a city of it. No hobby is ever denied.
    """
    text, asked = "".join(reply.split()), persona_question(question)
    denied = []
    if persona.gender in SLANG:
        claimed = set(_GENDER_CLAIM.findall(text))
        if asked == "gender":
            claimed |= {name for names in SLANG.items() for name in names if name in text}
        if claimed:
            denied.append(not claimed & {persona.gender, SLANG[persona.gender]})
    province, city = split_place(persona.location)
    own = {province, city} - {""}
    if own:
        if not city:
            own |= set(CITIES[province].split())
        claims = _PLACE_CLAIM.findall(text)
        named = {place for place in _places() | own for claim in claims if claim.startswith(place)}
        if asked == "location":
            named |= {place for place in _places() | own if place in text}
        if named:
            denied.append(not named & own)
    return any(denied) if denied else None
