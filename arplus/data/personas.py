"""Personas: what a profile says, and the places that are known."""

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
