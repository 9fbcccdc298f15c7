import pytest

from arplus.synthetic.personas import (
    ABROAD,
    ANSWERS,
    CITIES,
    QUESTIONS,
    Persona,
    agrees,
    answer,
    askable,
    contradicts,
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


def test_a_place_that_is_spelled_across_the_words_of_the_own_one_is_not_named():
    persona = Persona("女", "陕西安康", ())
    assert agrees("location", "我是陕西安康人", persona)
    assert not agrees("location", "我是陕西安康人，在西安", persona)


def test_prepared_words_make_a_persona_and_missing_ones_answer_nothing():
    assert Persona.from_words(["男", "四川成都", "美食", "[UNK]"]) == Persona("男", "四川成都", ("美食",))
    nobody = Persona.from_words(["[UNK]", "[UNK]", "[UNK]"])
    assert nobody == Persona("", "", ())
    assert askable(nobody) == ()
    assert askable(Persona("女", "其他", ())) == ("gender",)
    assert not any(agrees(kind, reply, nobody) for kind in QUESTIONS for reply in ("成都", "男", "美食", ""))


@pytest.mark.parametrize(
    ("reply", "persona", "question", "expected"),
    [
        ("我是男生呀", "女 四川成都", "", True),
        ("我是个妹子", "女 四川成都", "", False),
        ("我是女朋友的人", "男 四川成都", "", None),  # no claim
        ("男的呀", "女 四川成都", "", None),  # of whom?
        ("男的呀", "女 四川成都", "你是男生还是女生", True),
        ("女生", "女 四川成都", "你是男生还是女生", False),
        ("我是女生", " 四川成都", "", None),  # the profile does not say
        ("我在北京呢", "女 四川成都", "", True),
        ("我在四川呢", "女 四川成都", "", False),
        ("我家在成都", "女 四川成都", "", False),
        ("我是绵阳人", "女 四川成都", "", True),
        ("我是绵阳人", "女 四川", "", False),  # a city of the profile's province
        ("我是北京人", "女 其他", "", None),
        ("我在日本", "女 海外日本", "", False),
        ("我去过北京", "女 四川成都", "", None),
        ("北京的呀", "女 四川成都", "你是哪里人呀", True),
        ("成都的呀", "女 四川成都", "你是哪里人呀", False),
        ("我喜欢篮球", "女 四川成都", "你有什么爱好", None),
        ("我是女生，我在北京", "女 四川成都", "", True),
    ],
)
def test_what_contradicts_a_profile(reply, persona, question, expected):
    gender, place = persona.split(" ")
    assert contradicts(reply, Persona(gender, place, ("美食",)), question) is expected


def test_the_answers_of_a_persona_never_contradict_it():
    for place in PLACES:
        persona = Persona("女", place, ("美食",))
        for kind, forms in ANSWERS.items():
            for form in range(len(forms)):
                text = answer(kind, persona, form, 0)
                assert not contradicts(text, persona, QUESTIONS[kind][0]), (place, text)
