"""Personas of generated records: places, tags, and the questions and answers that tell a persona.

The questions and answers serve twice: the generator (:mod:`arplus.synthetic.write`) writes them, and an evaluation
measures with :func:`persona_question` and :func:`agrees` how many replies match the responder's persona.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Literal

Kind = Literal["location", "gender", "hobby"]
"""What a persona question asks for."""

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

_TAGS = (
    "美食 旅游 音乐 电影 80后 90后 听歌 睡觉 搞笑 星座 时尚 宅女 宅男 动漫 看书 摄影 游戏 篮球 足球 自由 逛街 购物 "
    "唱歌 跑步 健身 游泳 画画 跳舞 吉他 钢琴 瑜伽 骑行 爬山 钓鱼 烘焙 咖啡 奶茶 火锅 养猫 养狗 猫咪 手工 书法 围棋 "
    "羽毛球 乒乓球 台球 滑雪 滑板 露营 自驾游 追剧 韩剧 综艺 小说 诗歌 历史 科技 数码 汽车 化妆 护肤 美甲 穿搭 "
    "设计 写作 天蝎座 狮子座 双鱼座 白羊座 吃货 文艺 宅 懒 乐观 爱自由 选择恐惧症 正能量 攝影 音樂 電影 旅行 "
    "街拍 话剧 相声"
)
TAGS = _TAGS.split()
"""Frequent tags, the most frequent first; some in traditional characters, as in the real data."""

QUESTIONS: dict[Kind, tuple[str, ...]] = {
    "location": (
        "你 是 哪里 人 呀 ？",
        "你 哪里 人 ?",
        "你 家 在 哪里 啊 ？",
        "你 在 哪个 城市 ？",
        "你 老家 是 哪 的 ？",
        "请问 你 是 哪里 人 ～",
    ),
    "gender": (
        "你 是 男生 还是 女生 ？",
        "男 的 还是 女 的 ？",
        "你 是 男 是 女 呀 ?",
        "你 是 汉子 还是 妹子 ～",
    ),
    "hobby": (
        "你 有 什么 爱好 ？",
        "你 的 爱好 是 什么 ?",
        "你 平时 喜欢 什么 呀 ？",
        "你 对 什么 感兴趣 ？",
        "说说 你 的 兴趣 ～",
    ),
}
"""Questions in words; without spaces at most 10 characters, so that they survive the cut at 15 after a salutation."""

ANSWERS: dict[Kind, tuple[str, ...]] = {
    "location": (
        "我 是 {place} 人",
        "{place} 的 呀",
        "我 在 {place} 呢",
        "老家 {place} ！",
        "我 是 {town} 人 ， 你 呢",
        "{town} 人 ～",
    ),
    "gender": ("我 是 {sex} 生", "当然 是 {sex} 的 啦", "{sex} 的 呀", "我 是 {slang} ！", "{slang} 一枚 ～"),
    "hobby": ("我 喜欢 {tag}", "最爱 {tag} 啦", "{tag} 吧 ， 哈哈", "我 的 爱好 是 {tag}", "当然 是 {tag} ！"),
}
"""Answers in words; with the longest place or tag at most 15 characters without spaces."""

SLANG = {"男": "汉子", "女": "妹子"}
_CORES: dict[Kind, tuple[str, ...]] = {
    "location": ("哪里人", "你家在哪", "哪个城市", "老家是哪"),
    "gender": ("男生还是女生", "男的还是女的", "是男是女", "汉子还是妹子"),
    "hobby": ("什么爱好", "爱好是什么", "喜欢什么", "什么感兴趣", "你的兴趣"),
}


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


@cache
def _places() -> frozenset[str]:
    return frozenset([*CITIES, *ABROAD, *" ".join(CITIES.values()).split()])


def askable(persona: Persona) -> tuple[Kind, ...]:
    """The kinds of question that the persona has an answer to."""
    kinds: dict[Kind, bool] = {
        "location": any(split_place(persona.location)),
        "gender": persona.gender in SLANG,
        "hobby": bool(persona.tags),
    }
    return tuple(kind for kind, known in kinds.items() if known)


def answer(kind: Kind, persona: Persona, template: int, tag: int) -> str:
    """An answer in words: form ``template`` of :data:`ANSWERS` (modulo their number), with the ``tag``-th tag.

    The persona must have an answer (:func:`askable`).
    """
    form = ANSWERS[kind][template % len(ANSWERS[kind])]
    if kind == "location":
        parts = [part for part in split_place(persona.location) if part]
        return form.format(place=" ".join(parts), town=parts[-1])
    if kind == "gender":
        return form.format(sex=persona.gender, slang=SLANG[persona.gender])
    return form.format(tag=persona.tags[tag % len(persona.tags)])


def persona_question(utterance: str) -> Kind | None:
    """What the utterance (with or without spaces) asks of the other's persona; None where it asks nothing of it."""
    text = "".join(utterance.split())
    return next((kind for kind, cores in _CORES.items() if any(core in text for core in cores)), None)


def agrees(kind: Kind, reply: str, persona: Persona) -> bool:
    """Whether the reply (with or without spaces) answers the question of this kind as the persona would.

    A place agrees when the reply names the province, city or country and no other place that we know; a gender when
    it names this one and not the other; a hobby when it names one of the tags.
    """
    text = "".join(reply.split())
    if kind == "location":
        parts = split_place(persona.location)
        own = {part for part in parts if part}
        # 西安 is no place in 陕西安康: what spells out the persona's own place names no other one.
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
