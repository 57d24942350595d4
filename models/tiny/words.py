"""Keys and values of the recall dialogues. Each word is one token of the shipped tokenizer (with its leading space)."""

_KEYS = """
    anchor attic badge bakery banner barrel basket beacon bottle bridge bucket button cabin candle canyon carpet
    castle cellar chapel chimney cottage cradle curtain desert drawer engine fabric factory fence ferry flute
    forest fountain garage garden gate gift glove guitar hammer harbor helmet hotel island jacket kettle kitchen
    ladder lantern library locker mailbox market mirror museum needle office oven palace password pencil pillow
    pocket police prison pulley puzzle ribbon river saddle scarf school shelter signal sofa spoon stable statue
    station stove studio suitcase temple tent theater ticket tower tractor train treasure tunnel umbrella valley
    vase village violin wagon wallet window
"""
_VALUES = """
    almond amber apple apricot badger bamboo banana basil beaver beetle berry bison butter camel canary carrot
    cedar cheese cherry chicken cinnamon clover cobra cocoa coconut copper coral cotton cow crab cricket crimson
    crow cucumber daisy deer dolphin donkey duck eagle emerald falcon fig fox frog garlic ginger giraffe goat
    gold goose grape hawk hazel honey horse indigo iron ivory jade jaguar jasmine kiwi koala lemon lettuce lilac
    lily lime lion lizard llama lobster lotus lynx mango maple marble melon mint monkey moose mouse mustard
    nutmeg oak octopus olive onion orange orchid otter owl panda papaya parrot peach peanut pear pearl pepper
    pigeon pine plum potato pumpkin purple rabbit radish raven rice robin rose ruby saffron salmon scarlet seal
    shark sheep silver snail sparrow spider squid swan tiger tomato topaz trout tulip turkey turtle vanilla
    velvet walnut walrus whale willow wolf zebra
"""
KEYS: tuple[str, ...] = tuple(_KEYS.split())
VALUES: tuple[str, ...] = tuple(_VALUES.split())
