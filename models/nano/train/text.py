"""Questions, prompts and replies for clips of coloured shapes (text only, no pixels).

A *scene* is a dict made by `data.make_scene`:
  objects: [{"colour", "shape", "actions": [one or two of ACTIONS], "appears": 0 or 1}]
"""
import random

COLOURS = ["red", "green", "blue", "yellow", "purple", "white"]
SHAPES = ["circle", "square", "triangle", "star", "cross"]
ACTIONS = ["moves left", "moves right", "moves up", "moves down", "stays still", "grows", "shrinks"]
DIRECTIONS = ["left", "right", "up", "down"]
NUMBERS = ["one", "two", "three", "four"]
TYPES = ["direction", "size", "colour", "shape", "count", "order"]

SYSTEM = ("A chat between a curious user and an artificial intelligence assistant. "
          "The assistant gives helpful, detailed, and polite answers to the user's questions. ")
OUTPUT = ("Output the thinking process in <think> </think> and final answer (option) "
          "in <answer> </answer> tags.")
BEFORE_IMAGE = SYSTEM + "USER: "
EOS = "<|endoftext|>"


def prompt_after_image(question):
    """The text after `<image>`; an empty question leaves only the role."""
    question = question.strip()
    return ("\n" + question if question else "") + " ASSISTANT:"


def split_by_combination(scene):
    """'unseen' when any colour-shape-action of the clip is held out from training."""
    for o in scene["objects"]:
        for a in o["actions"]:
            key = COLOURS.index(o["colour"]) * 3 + SHAPES.index(o["shape"]) * 2 + ACTIONS.index(a)
            if key % 5 == 0:
                return "unseen"
    return "seen"


def name(o):
    return f'{o["colour"]} {o["shape"]}'


def describe(scene):
    """The first sentences of every reply: what is seen."""
    objs = scene["objects"]
    if not objs:
        return "The video shows nothing."
    if len(objs) == 1:
        o = objs[0]
        text = f"The video shows a {name(o)}."
        if len(o["actions"]) == 2:
            return text + f' First it {o["actions"][0]}, then it {o["actions"][1]}.'
        return text + f' It {o["actions"][0]}.'
    a, b = objs
    if b["appears"]:
        return f"The video shows a {name(a)} first, then a {name(b)} appears."
    return (f"The video shows a {name(a)} and a {name(b)}. The {name(a)} {a['actions'][0]}. "
            f"The {name(b)} {b['actions'][0]}.")


def _pick(rng, right, wrong, n):
    """n options, the right one at a random place -> (options, index)."""
    opts = rng.sample(wrong, min(n - 1, len(wrong))) + [right]
    rng.shuffle(opts)
    return opts, opts.index(right)


def _the(rng, scene, o, hide=None):
    """A way to refer to object `o` without naming the property asked for."""
    if len(scene["objects"]) == 1:
        words = ["the shape", "the object", "it"]
        if hide != "shape":
            words += [f'the {o["shape"]}'] * 2
        if hide != "colour":
            words += [f'the {o["colour"]} shape', f'the {o["colour"]} object']
        if hide is None:
            words += [f"the {name(o)}"] * 2
        return rng.choice(words)
    if hide == "shape":
        return rng.choice([f'the {o["colour"]} shape', f'the {o["colour"]} object'])
    same_shape = sum(p["shape"] == o["shape"] for p in scene["objects"]) > 1
    if hide == "colour":
        return None if same_shape else f'the {o["shape"]}'
    words = [f"the {name(o)}"] * 3 + [f'the {o["colour"]} shape', f'the {o["colour"]} one']
    return rng.choice(words if same_shape else words + [f'the {o["shape"]}'] * 2)


def make_question(rng, scene, kind=None):
    """One multiple-choice question -> dict(type, body, options, answer index, fact) or None."""
    objs = scene["objects"]
    two_phase = len(objs) == 1 and len(objs[0]["actions"]) == 2
    timed = len(objs) == 2 and objs[1]["appears"]
    kinds = ["colour", "shape", "count"]
    if two_phase or timed:
        kinds = ["order"] * 5 + kinds
    else:
        kinds = ["direction"] * 3 + ["size"] * 3 + kinds
    kind = kind or rng.choice(kinds)
    if kind not in kinds:
        return None
    o = rng.choice(objs)
    n = rng.choice([2, 3, 3, 4, 4, 4])
    action = o["actions"][0]
    if kind == "direction":
        moving = action.startswith("moves ")
        right = action[6:] if moving else "it stays still"
        if not moving and action != "stays still":
            return None  # growing and shrinking shapes are asked about their size
        opts, k = _pick(rng, right, [d for d in DIRECTIONS + ["it stays still"] if d != right], n)
        who = _the(rng, scene, o)
        if rng.random() < 0.25:  # the same, in whole phrases
            opts = [x if x.startswith("it ") else f"it moves {x}" for x in opts]
            q = rng.choice([f"What does {who} do?", f"What does {who} do in the video?", f"How does {who} move?"])
        else:
            q = rng.choice([f"Which way does {who} move?", f"In which direction does {who} move?",
                            f"Which direction does {who} move in the video?", f"Where does {who} move?",
                            f"What is the direction of {who}?", f"Which way is {who} going?",
                            f"In what direction is {who} moving?"])
        fact = f"the {o['shape']} {action}"
    elif kind == "size":
        word = {"grows": "grows", "shrinks": "shrinks"}.get(action, "stays the same")
        if word == "stays the same" and rng.random() < 0.75:
            return None  # most actions leave the size alone: keep the three answers about as frequent
        forms = rng.choice([["it grows", "it shrinks", "it stays the same"],
                            ["it grows", "it shrinks", "it stays the same"],
                            ["grows", "shrinks", "stays the same"],
                            ["it gets bigger", "it gets smaller", "it stays the same"],
                            ["bigger", "smaller", "the same size"]])
        right = forms[["grows", "shrinks", "stays the same"].index(word)]
        opts, k = _pick(rng, right, [f for f in forms if f != right], min(n, 3))
        who = _the(rng, scene, o)
        q = rng.choice([f"How does the size of {who} change?", f"What happens to the size of {who}?",
                        f"Does {who} grow or shrink?", f"How does {who} change in size?",
                        f"Does {who} get bigger or smaller?"])
        fact = f"the {o['shape']} {word}"
    elif kind == "colour":
        who = _the(rng, scene, o, hide="colour")
        if who is None:
            return None
        opts, k = _pick(rng, o["colour"], [c for c in COLOURS if c != o["colour"]], n)
        c = rng.choice(["colour", "color"])
        q = rng.choice([f"What {c} is {who}?", f"What is the {c} of {who}?", f"Which {c} is {who}?",
                        f"Which {c} does {who} have?", f"What {c} is {who} in the video?"])
        fact = f"the {o['shape']} is {o['colour']}"
    elif kind == "shape":
        opts, k = _pick(rng, o["shape"], [s for s in SHAPES if s != o["shape"]], n)
        if rng.random() < 0.3:
            opts = [f"a {s}" for s in opts]
        who = _the(rng, scene, o, hide="shape")
        qs = [f"What shape is {who}?", f"What is the shape of {who}?", f"Which shape is {who}?",
              f"What kind of shape is {who}?"]
        if len(objs) == 1:
            qs += ["What shape is in the video?", "Which shape is shown in the video?", "What shape can be seen?",
                   "Which shape do you see?"]
        q = rng.choice(qs)
        fact = f"the {o['colour']} shape is a {o['shape']}"
    elif kind == "count":
        right = NUMBERS[len(objs) - 1]
        opts, k = _pick(rng, right, [x for x in NUMBERS if x != right], n)
        if rng.random() < 0.3:
            opts = [str(NUMBERS.index(x) + 1) for x in opts]
        w = rng.choice(["shapes", "objects"])
        q = rng.choice([f"How many {w} are there?", f"How many {w} are in the video?", f"How many {w} do you see?",
                        f"How many {w} can be seen in the video?", f"What is the number of {w}?"])
        fact = f"there is {right} shape" if len(objs) == 1 else f"there are {right} shapes"
    else:
        last = rng.random() < 0.25
        if timed:
            good, bad = (objs[1], objs[0]) if last else (objs[0], objs[1])
            right, wrong = f"the {name(good)}", [f"the {name(bad)}"]
            while len(wrong) < n - 1:
                x = f"the {rng.choice(COLOURS)} {rng.choice(SHAPES)}"
                if x != right and x not in wrong:
                    wrong.append(x)
            opts, k = _pick(rng, right, wrong, n)
            w = "last" if last else "first"
            q = rng.choice([f"Which shape appears {w}?", f"What appears {w}?", f"Which object appears {w} in the video?",
                            f"Which shape can be seen {w}?", f"Which shape comes {w}?"])
            fact = f"the {name(good)} appears {w}"
        else:
            acts = o["actions"]
            good, bad = (acts[1], acts[0]) if last else (acts[0], acts[1])
            others = [a for a in ACTIONS if a not in acts]
            wrong = [bad] + rng.sample(others, n - 2)
            subject = rng.choice(["it", "it", f"the {o['shape']}", "the shape"])
            opts, k = _pick(rng, f"{subject} {good}", [f"{subject} {x}" for x in wrong], n)
            w = "last" if last else "first"
            who = _the(rng, scene, o)
            q = rng.choice([f"What happens {w}?", f"What happens {w} in the video?", f"What does {who} do {w}?",
                            f"What is the {w} thing that happens?", f"Which of these happens {w}?"])
            fact = f"the {o['shape']} {good} {w}"
    return {"type": kind, "body": q, "options": opts, "answer": k, "fact": fact}


def write_options(rng, q):
    """Body and options as a user or a benchmark writes them -> the question without the output sentence."""
    style = rng.choices(["plain", "Options:", "paren", "colon"], [75, 12, 8, 5])[0]
    letters = "ABCD"
    line = {"paren": "({}) {}", "colon": "{}: {}"}.get(style, "{}. {}")
    head = "\nOptions:" if style == "Options:" else ""
    return q["body"] + head + "".join("\n" + line.format(letters[i], o) for i, o in enumerate(q["options"]))


TOPIC = {"direction": "the direction", "size": "the size", "colour": "the colour", "shape": "the shape",
         "count": "the number", "order": "the order"}


def reply(scene, q):
    """Describe, go through the options, look again, conclude."""
    text = describe(scene) + f" The question is about {TOPIC[q['type']]}: {q['fact']}."
    for i, o in enumerate(q["options"]):
        text += f" {'ABCD'[i]} says {o}, {'yes' if i == q['answer'] else 'no'}."
    letter = "ABCD"[q["answer"]]
    text += f" Looking again, {q['fact']}, so {letter} fits."
    return f" <think> {text} </think> <answer>{letter}</answer>{EOS}"


# ---- everything else: the reply still has the format ---------------------------------------

OPEN = ["Describe the video.", "What happens in the video?", "What is in the video?", "What do you see?",
        "Please describe what happens.", "What is shown in the video?", "", "Tell me about the video."]
OTHER = ["What is the action performed by the person in the video?", "Why is the man laughing?", "Who is the woman?",
         "What is the weather like?", "What sound can be heard?", "What is written on the sign?",
         "What is the main topic of the video?", "Which team wins the game?", "Where was this filmed?",
         "What is the dog doing?", "How old is the child?", "What will happen next?", "Is it day or night?"]
OTHER_OPTIONS = ["drop", "sit down", "pick up", "squat down", "a dog", "a cat", "a car", "the man", "the woman", "rain",
                 "snow", "a game", "music", "a kitchen", "a street", "yes", "no", "day", "night", "running", "cooking",
                 "happy", "sad", "a ball", "water", "jumping", "walking", "a house", "a tree", "it falls"]
CHAT = ["Hello", "Hi!", "Who are you?", "What can you do?", "Tell me a joke.", "What is the capital of France?",
        "What is 2 + 2?", "Write a poem.", "Thank you!", "How are you?", "Help me with my code.", "Say hello."]


def _noise_word(rng):
    return "".join(rng.choice("etaoinshrdlucmfwypvbgkqjxz") for _ in range(rng.randint(2, 8)))


def _noisy(rng, s):
    """Some unknown words, so that strange text does not break the format."""
    words = s.split(" ")
    for _ in range(rng.choice([0, 0, 1, 3])):
        words.insert(rng.randint(0, len(words)), _noise_word(rng))
    return " ".join(words)


def open_pair(rng, scene):
    """An open question about the clip -> (question, reply)."""
    q = rng.choice(OPEN)
    d = describe(scene)
    return q, f" <think> {d} The question is open. Looking again, I can describe it. </think> <answer>{d}</answer>{EOS}"


def other_pair(rng, scene):
    """A question this model knows nothing about -> (question, reply): format kept, first option, said so."""
    q = _noisy(rng, rng.choice(OTHER))
    if rng.random() < 0.7:
        n = rng.choice([2, 3, 4, 4])
        opts = [x if rng.random() < 0.8 else _noise_word(rng) for x in rng.sample(OTHER_OPTIONS, n)]
        q = write_options(rng, {"body": q, "options": opts})
        return q, (f" <think> {describe(scene)} The question is about something else. "
                   f"Looking again, no option fits, so I guess A. </think> <answer>A</answer>{EOS}")
    return q, (f" <think> {describe(scene)} The question is about something else. "
               f"Looking again, I do not know. </think> <answer>I do not know.</answer>{EOS}")


def two_turns(first, second):
    """A finished turn and the next one of the same conversation -> (text after the image, reply)."""
    (p1, r1), (p2, r2) = first, second
    return p1 + r1 + "USER: " + p2.removeprefix("\n").removeprefix(" "), r2


def chat_pair(rng):
    """No video at all."""
    return _noisy(rng, rng.choice(CHAT)), (" <think> There is no video. Looking again, I can only answer about short videos "
                                           f"of shapes. </think> <answer>Please send a video.</answer>{EOS}")
