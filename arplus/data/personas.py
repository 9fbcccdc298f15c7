"""Personas: what a profile says, the places that are known, and what is asked of and said about oneself."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Literal

from arplus.text import FEMALE, MALE

Kind = Literal["location", "gender", "hobby"]
"""What can be asked of a persona."""

CITIES = {
    "北京": "东城区 西城区 朝阳区 海淀区 丰台区 通州区",
    "上海": "黄浦区 徐汇区 静安区 浦东新区 闵行区 宝山区",
    "天津": "和平区 南开区 河西区",
    "重庆": "渝中区 江北区 沙坪坝区",
    "广东": "广州 深圳 东莞 佛山 珠海 汕头 湛江 惠州",
    "浙江": "杭州 宁波 温州 绍兴 金华 台州",
    "江苏": "南京 苏州 无锡 常州 南通 徐州",
    "四川": "成都 绵阳 乐山 南充 德阳",
    "山东": "济南 青岛 烟台 潍坊 临沂",
    "河南": "郑州 洛阳 开封 南阳",
    "湖北": "武汉 宜昌 襄阳 荆州",
    "湖南": "长沙 株洲 湘潭 岳阳",
    "福建": "福州 厦门 泉州 漳州",
    "辽宁": "沈阳 大连 鞍山 锦州",
    "黑龙江": "哈尔滨 大庆 齐齐哈尔",
    "吉林": "长春 延边 四平",
    "河北": "石家庄 唐山 保定 秦皇岛",
    "山西": "太原 大同 运城",
    "陕西": "西安 咸阳 宝鸡",
    "安徽": "合肥 芜湖 蚌埠 黄山",
    "江西": "南昌 九江 赣州",
    "广西": "南宁 桂林 柳州 北海",
    "云南": "昆明 大理 丽江",
    "贵州": "贵阳 遵义",
    "甘肃": "兰州 天水",
    "海南": "海口 三亚",
    "内蒙古": "呼和浩特 包头 赤峰",
    "宁夏": "银川",
    "青海": "西宁",
    "新疆": "乌鲁木齐 喀什",
    "西藏": "拉萨",
    "香港": "九龙城区 沙田区",
    "澳门": "氹仔",
    "台湾": "台北 高雄 台中",
}
"""Cities by province, the larger ones first."""

_ABROAD = "美国 日本 英国 韩国 加拿大 澳大利亚 法国 德国 新加坡 意大利 新西兰 马来西亚 泰国 西班牙"
ABROAD = _ABROAD.split()
"""Countries of ``海外 …``."""

SLANG = {MALE: "汉子", FEMALE: "妹子"}
"""Other words for the genders."""


@dataclass(frozen=True)
class Persona:
    """A persona as the model sees it; an empty string or no tag where the profile lacks the item."""

    gender: str
    """男, 女 or empty."""
    location: str
    """Province and city as one word (四川成都), 其他, 海外 and a country, or empty."""
    tags: tuple[str, ...]
    """The tags."""

    @classmethod
    def from_words(cls, words: Sequence[str]) -> "Persona":
        """From a profile's words: gender, place, tags; "" or [UNK] stands for what is missing or unknown."""
        gender, place, *tags = ["" if word == "[UNK]" else word for word in words]
        return cls(gender, place, tuple(tag for tag in tags if tag))


@cache
def split_place(place: str) -> tuple[str, str]:
    """(province, city) of a joined place, ("", country) of one abroad; either is empty where there is none.

    >>> split_place("四川成都"), split_place("四川"), split_place("海外日本"), split_place("其他")
    (('四川', '成都'), ('四川', ''), ('', '日本'), ('', ''))
    """
    if place.startswith("海外"):
        return "", place.removeprefix("海外")
    province = next((name for name in CITIES if place.startswith(name)), "")
    return province, place[len(province) :] if province else ""


def askable(persona: Persona) -> tuple[Kind, ...]:
    """The kinds of question that the persona has an answer to."""
    kinds: dict[Kind, bool] = {
        "location": any(split_place(persona.location)),
        "gender": persona.gender in SLANG,
        "hobby": bool(persona.tags),
    }
    return tuple(kind for kind, known in kinds.items() if known)


_CORES: dict[Kind, tuple[str, ...]] = {
    "location": ("哪里人", "你家在哪", "哪个城市", "老家是哪"),
    "gender": ("男生还是女生", "男的还是女的", "是男是女", "汉子还是妹子"),
    "hobby": ("什么爱好", "爱好是什么", "喜欢什么", "什么感兴趣", "你的兴趣"),
}
PERSONA_QUESTION = "|".join(core for cores in _CORES.values() for core in cores)
"""What an utterance holds that asks for any of these, as a pattern."""


def persona_question(utterance: str) -> Kind | None:
    """What the utterance (with or without spaces) asks of the other's persona; None where it asks nothing of it."""
    text = "".join(utterance.split())
    return next((kind for kind, cores in _CORES.items() if any(core in text for core in cores)), None)


@cache
def known_places() -> frozenset[str]:
    """All places that are known by name."""
    return frozenset([*CITIES, *ABROAD, *" ".join(CITIES.values()).split()])


_GENDER = "我(?:就|也|真|当然)?是(?:个|一个|一枚)?(男|女|汉子|妹子)"
_PLACE = "我(?:们)?(?:家|老家)?(?:就|也)?(?:是|在|住在|住)"
MAY_CLAIM = f"{_GENDER}|{_PLACE}"
"""What a reply must hold to claim anything unasked; a pattern without lookahead, for Arrow."""
_GENDER_CLAIM = re.compile(f"{_GENDER}(?!朋友|友|票|神|儿)")
_PLACE_CLAIM = re.compile(f"{_PLACE}(?=(.*))")


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
        named = {place for place in known_places() | own for claim in claims if claim.startswith(place)}
        if asked == "location":
            named |= {place for place in known_places() | own if place in text}
        if named:
            denied.append(not named & own)
    return any(denied) if denied else None
