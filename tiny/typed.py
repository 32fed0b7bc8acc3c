"""Captions as people type them, in other words than scenes.caption, and what they ask for.

What the world has is named after each caption in the world's own words, and measured by
`python -m tiny.measure typed`. The rest of a caption should leave that intact.
"""

TYPED = {
    # fewer words than usual
    "red house": "red house",
    "a boat, snow": "boat, lake, snow",
    "blue house!!": "blue house",
    "night": "night",
    "white car dusk": "white car, dusk",
    "pink": "",
    "trees in fog": "tree, fog",
    "boat": "boat, lake",
    # other words, another order
    "Two red cars at night": "red car, night",
    "It is snowing. There is a yellow house.": "yellow house, snow",
    "At night, a purple car on the beach": "purple car, night, sand",
    "rainy evening, green tree, white house": "green tree, white house, dusk, rain",
    "a foggy day by the water with an orange boat": "orange boat, lake, day, fog",
    "snow on the grass and a pink tree in it": "pink tree, grass, snow",
    "the sun is up over a blue car on the sand": "blue car, sand, day",
    "stars above a red house in a green field": "red house, grass, night",
    "a house that is white, and a tree that is orange": "white house, orange tree",
    "winter, lake, one blue boat": "blue boat, lake, snow",
    "on the lake a boat, white, at dusk": "white boat, lake, dusk",
    "a yellow car next to a yellow house": "yellow car, yellow house",
    "an old purple house in heavy rain": "purple house, rain",
    "sunset, orange house": "orange house, dusk",
    "misty morning, green house": "green house, fog",
    # capitals, plurals, punctuation
    "A RED CAR ON SAND AT NIGHT": "red car, sand, night",
    "Green Trees And White Houses": "green tree, white house",
    "blue cars; snow; night": "blue car, snow, night",
    "pink house... in the rain...": "pink house, rain",
    "orange boats - dusk - lake": "orange boat, lake, dusk",
    "\"white tree\" (foggy)": "white tree, fog",
    # typing errors
    "a redd house at nigth": "red house, night",
    "yelow car in the snow": "yellow car, snow",
    "a bleu boat by the lake": "blue boat, lake",
    "purple tre on gras": "purple tree, grass",
    "a whit house and a pink car in the ran": "white house, pink car, rain",
    # what the world does not have
    "a red house and a dragon": "red house",
    "photorealistic blue car, 4k, highly detailed": "blue car",
    "a cat in a white boat by the lake": "white boat, lake",
    "my grandmother's green house in winter": "green house, snow",
    "a yellow tree, oil on canvas, by Monet": "yellow tree",
    "robots fighting over an orange car at night": "orange car, night",
}
