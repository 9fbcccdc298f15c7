"""Whether replies agree with their speaker's persona or contradict it."""

from dataclasses import dataclass

from arplus.data.personas import SLANG, Kind, Persona, askable, contradicts, known_places, persona_question, split_place
from arplus.sums import Sums


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
        if (denied := contradicts(reply, persona, question)) is not None:
            self.claims += 1
            self.contradicting += denied
        if (denied := contradicts(reference, persona, question)) is not None:
            self.reference_claims += 1
            self.reference_contradicting += denied

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
        return any(name in text for name in own) and not any(name in rest for name in known_places() - own)
    if kind == "gender":
        named = {sex for sex, slang in SLANG.items() if sex in text or slang in text}
        return named == {persona.gender}
    return any(tag in text for tag in persona.tags)
