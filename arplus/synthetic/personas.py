"""What generated personas are made of: tags, and the questions and answers that tell a persona.

:mod:`arplus.evaluation.consistency` measures how many replies match the responder's persona.
"""

from arplus.data.personas import SLANG, Kind, Persona, split_place

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
