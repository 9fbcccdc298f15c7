"""What replies say of their speaker is held against the profile."""

import pytest

from arplus.data.personas import Persona, askable, contradicts, persona_question
from arplus.evaluation.consistency import PersonaMetrics, agrees, asks

CHENGDU = Persona("女", "四川成都", ("美食",))


def test_replies_and_references_are_counted_apart() -> None:
    metrics = PersonaMetrics()
    metrics.add("吃了吗", CHENGDU, "我是男生", "我在成都呀")
    metrics.add("吃了吗", CHENGDU, "吃了", "我是女生")
    metrics.add("你是哪里人呀", CHENGDU, "四川的", "北京的呀")
    assert asks("你是哪里人呀", CHENGDU)
    metrics.add_answer("你是哪里人呀", CHENGDU, "四川的", "北京的呀")
    assert metrics == PersonaMetrics(1, 1, 0, 2, 1, 3, 1, shuffled=1)
    assert metrics.result() == {
        "questions": 1,
        "agreement": 1.0,
        "agreement_with_shuffled_personas": 0.0,
        "claims": 2,
        "contradiction": 0.5,
        "contradiction_of_references": 1 / 3,
    }
    assert (metrics + metrics).claims == 4


def test_both_shares_are_of_the_replies_they_counted() -> None:
    metrics = PersonaMetrics()
    metrics.add_answer("你是哪里人呀", CHENGDU, "北京的呀", "成都")
    metrics.add_answer("你是哪里人呀", CHENGDU, "成都", None)
    shares = {"agreement": 0.5, "agreement_with_shuffled_personas": 1.0}
    assert metrics.result() == {"questions": 2, **shares, "claims": 0}


def test_without_claims_there_is_no_share() -> None:
    assert PersonaMetrics().result() == {"questions": 0, "claims": 0}
    assert not asks("吃了吗", CHENGDU)
    assert not asks("你是哪里人呀", Persona("女", "其他", ()))


@pytest.mark.parametrize("text", ["今天 天气 真 好", "我 是 四川 人", "", "[UNK]", "我 喜欢 你"])
def test_other_utterances_are_no_persona_questions(text):
    assert persona_question(text) is None


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
    assert not any(
        agrees(kind, reply, nobody) for kind in ("location", "gender", "hobby") for reply in ("成都", "男", "美食", "")
    )


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
