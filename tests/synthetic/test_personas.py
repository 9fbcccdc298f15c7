"""What the generator says of a persona, the evaluation takes for it."""

import pytest

from arplus.data.personas import ABROAD, CITIES, Persona, askable, contradicts, persona_question
from arplus.evaluation.consistency import agrees
from arplus.synthetic.personas import ANSWERS, QUESTIONS, answer

TOWNS = [province + city for province, cities in CITIES.items() for city in cities.split()]
PLACES = [*TOWNS, *CITIES, *(f"海外{country}" for country in ABROAD)]


@pytest.mark.parametrize("kind", QUESTIONS)
def test_questions_are_recognised_also_after_a_salutation_and_the_cut(kind):
    for question in QUESTIONS[kind]:
        assert persona_question(question) == kind
        cut = ("立即该校，" + question.replace(" ", ""))[:15]
        assert persona_question(cut) == kind


def test_every_answer_fits_and_agrees_with_its_persona():
    for place in PLACES:
        persona = Persona("男", place, ("选择恐惧症",))
        assert askable(persona) == ("location", "gender", "hobby")
        for kind, forms in ANSWERS.items():
            for form in range(len(forms)):
                text = answer(kind, persona, form, 0).replace(" ", "")
                assert len(text) <= 15
                assert agrees(kind, text, persona), (place, text)


def test_answers_of_another_persona_do_not_agree():
    me, other = Persona("男", "四川成都", ("美食",)), Persona("女", "浙江杭州", ("篮球", "电影"))
    for kind, forms in ANSWERS.items():
        for form in range(len(forms)):
            assert not agrees(kind, answer(kind, other, form, 1), me)


def test_the_answers_of_a_persona_never_contradict_it():
    for place in PLACES:
        persona = Persona("女", place, ("美食",))
        for kind, forms in ANSWERS.items():
            for form in range(len(forms)):
                text = answer(kind, persona, form, 0)
                assert not contradicts(text, persona, QUESTIONS[kind][0]), (place, text)
