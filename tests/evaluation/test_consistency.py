"""What replies say of their speaker is held against the profile."""

from arplus.evaluation.consistency import PersonaMetrics, asks
from arplus.synthetic.personas import Persona

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
