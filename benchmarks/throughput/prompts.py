"""What is asked: everyday English, 40 to 45 words each, short enough for a context of 256 bytes."""

from __future__ import annotations

PROMPTS = (
    "The harbour was quiet when the first boats came in, and the old man who sold tea on the pier said that he had not "
    "seen so few gulls in the air on a market day since he was a boy. He",
    "Write a short letter to a friend who wants to learn to bake bread at home. Say which flour to buy, how long the "
    "dough should rest, and what to do if it will not rise at all in the cold.",
    "A train leaves the city at noon and stops at four small towns on its way to the sea. Tell what the people who get "
    "on and off at each stop are up to, and what they can see out of the window.",
    "When we moved the school library to the new hall, we had to pick which books to keep. Some of us asked for more "
    "maps, some for more plays, and the head of the school asked us to be fair. So we",
    "Explain to a child why the moon seems to change its shape in the sky from week to week. Use a lamp, a ball and a "
    "dark room in what you say, and leave out any word that is hard to read for them.",
    "The recipe is an easy one: cut two large onions, fry them in a wide pan until they are soft and brown, add a cup "
    "of rice and some salt, pour in hot water, and do not stir it any more. After that",
    "In the spring the river came over its banks twice in a month, and the farmers on the low fields lost most of what "
    "they had sown. The town then built a wall of earth and stone, which by the fall had",
    "Give me three ways to keep a small flat cool in a hot summer when there is no fan and the sun is on the windows "
    "all day. For each way say what it costs, how long it takes, and how well it works.",
    "My sister plays the cello, and my brother sings in a choir that meets on Monday night in the hall near the post "
    "office. Last week they were both asked to play at a wedding, and what came next was",
    "The museum opens at ten and is free on the first Sunday of the month. If you come with a group, please call a day "
    "before, leave your bags at the desk by the door, and do not use a flash when you",
    "Two people stand at a bus stop in the rain. One of them has an umbrella and the other has a big dog that is cold "
    "and wet. Write what they say to each other until the bus comes, and keep it light.",
    "A good map tells you where you are, where you can go, and what lies in between. The first ones that sailors had "
    "told them little of this, and yet they went out, since they had learned to read the",
    "List what you would put in a bag for a walk of two days in the hills in late fall, when the nights are cold and "
    "the huts are shut. Begin with what keeps you warm and dry, and end with what you eat.",
    "The shop on the corner sells old clocks, and all of them tell a different time. The woman who runs it says she "
    "likes it that way, for a guest who asks her what time it is has to stay and talk. One day",
    "Compare a bicycle and a car for a person who lives six miles from work, has a child to take to school, and has a "
    "steep hill on the way home. Say which of the two you would choose at last, and why so.",
    "It snowed for three days, and by the fourth the road to the village was gone. We had wood, flour and a radio that "
    "spoke only at night, so each of us found something to do, and my aunt began to",
)


def numbered(first: int, count: int) -> list[str]:
    """So many prompts, each behind a number of its own, counted from `first`."""
    return [f"{first + place:05d} {PROMPTS[place % len(PROMPTS)]}" for place in range(count)]
