import pytest

from arplus.data.personas import (
    ABROAD,
    ANSWERS,
    CITIES,
    QUESTIONS,
    Persona,
    agrees,
    answer,
    askable,
    persona_question,
)

TOWNS = [province + city for province, cities in CITIES.items() for city in cities.split()]
PLACES = [*TOWNS, *CITIES, *(f"海外{country}" for country in ABROAD)]


@pytest.mark.parametrize("kind", QUESTIONS)
def test_questions_are_recognised_also_after_a_salutation_and_the_cut(kind):
    for question in QUESTIONS[kind]:
        assert persona_question(question) == kind
        cut = ("立即该校，" + question.replace(" ", ""))[:15]
        assert persona_question(cut) == kind


@pytest.mark.parametrize("text", ["今天 天气 真 好", "我 是 四川 人", "", "[UNK]", "我 喜欢 你"])
def test_other_utterances_are_no_persona_questions(text):
    assert persona_question(text) is None


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


@pytest.mark.parametrize(
    ("kind", "reply", "expected"),
    [
        ("location", "我是四川人", True),
        ("location", "我是成都人", True),
        ("location", "四川绵阳的", False),
        ("location", "不告诉你", False),
        ("gender", "是男是女你猜", False),
        ("gender", "妹子", True),
        ("hobby", "最爱电影", True),
        ("hobby", "最爱游戏", False),
    ],
)
def test_agreement(kind, reply, expected):
    assert agrees(kind, reply, Persona("女", "四川成都", ("美食", "电影"))) is expected


def test_a_place_outside_the_list_agrees_by_its_parts():
    persona = Persona("女", "四川攀枝花", ())
    assert agrees("location", "我是攀枝花人", persona)
    assert not agrees("location", "我是杭州人", persona)


def test_prepared_words_make_a_persona_and_missing_ones_answer_nothing():
    assert Persona.from_words(["男", "四川成都", "美食", "[UNK]"]) == Persona("男", "四川成都", ("美食",))
    nobody = Persona.from_words(["[UNK]", "[UNK]", "[UNK]"])
    assert nobody == Persona("", "", ())
    assert askable(nobody) == ()
    assert askable(Persona("女", "其他", ())) == ("gender",)
    assert not any(agrees(kind, reply, nobody) for kind in QUESTIONS for reply in ("成都", "男", "美食", ""))
