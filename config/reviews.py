"""
The paper's controlled-sentiment task in miniature, with nothing to download:

    bash quickstart.sh                          # sets up and runs the four stages:

    python prepare_prefs.py config/reviews.py   # the grammar below writes the data      TODO s
    python sft.py config/reviews.py             # a tiny GPT learns the language         TODO min, 2 CPU cores
    python dpo.py config/reviews.py             # and comes to prefer positive reviews   TODO min
    python sample.py config/reviews.py          # before and after, with the true reward

To expect: TODO true reward, share positive and share well formed, before and after.

A grammar writes short film reviews of mixed sentiment. Two continuations of one prefix are compared by their
true reward and labelled with noise, as people label. Section 6.1 of the paper (arXiv 2305.18290) does so with
IMDb prefixes of 2-8 tokens and a sentiment classifier; here the reward is known exactly, and so is whether a
text is still a review.

Every review has a hidden polarity z, +1 or -1, an even coin. Sentiment words come in pairs of opposites with
weights +s and -s. A sentence's form is drawn evenly; among the sentences of a form, one whose words weigh
s_1 .. s_n has probability proportional to exp(z/2 * (s_1 + .. + s_n)): kind words are likelier in a
positive review, but most reviews hold both sorts. Put every word's opposite in its place and you have another
sentence of that form, as likely under the other polarity. So the constant that makes the probabilities add up
to one does not depend on z, and Bayes' rule leaves

    reward(review) = log P(z=+1 | review) / P(z=-1 | review) = the sum of the weights of its words, exactly.
"""
import functools
import itertools
import math
import random
import re

name = 'reviews'
prepare = dict(
    source='config/reviews.py',         # pairs() below
    documents='config/reviews.py',      # documents() below: what the model learns the language from
    tokenizer='bpe:1024',
    template='<|endoftext|>{prompt}',
    max_length=128,
    max_prompt_length=32,
)
sft = dict()                            # TODO
dpo = dict()                            # TODO
sample = dict(reward='config/reviews.py')

DOCUMENTS = dict(train=20_000, val=1_000)
PAIRS = dict(train=8_000, val=500)
HELD_OUT = 1 / 8                        # of all texts and all prompts belong to val, by a hash of the text
PROMPT_WORDS = 2, 8                     # as the paper's prefixes of 2-8 tokens

# -----------------------------------------------------------------------------
# the words

STRONG, MILD = 2.0, 0.5                 # weights: e^2 = 7.4 times as likely under one z as under the other

# Pairs of opposites, strongest first: the weight falls evenly from STRONG to MILD. No word is in two lists.
OPPOSITES = dict(
    film='superb/dreadful magnificent/atrocious brilliant/abysmal wonderful/terrible outstanding/appalling '
         'marvellous/awful splendid/lousy thrilling/dismal delightful/tiresome memorable/pointless '
         'impressive/disappointing satisfying/frustrating entertaining/boring enjoyable/forgettable '
         'amusing/awkward promising/mediocre pleasing/uneven watchable/overlong',
    story_is='ingenious/idiotic enthralling/insipid gripping/tedious inspired/inane absorbing/dreary '
             'inventive/lazy intelligent/senseless witty/witless fresh/stale clever/contrived engaging/dull '
             'lively/laboured crisp/rambling coherent/muddled brisk/slow',
    people_is='mesmerising/unbearable radiant/hopeless magnetic/wooden captivating/insufferable '
              'compelling/grating charismatic/lifeless touching/shrill charming/irritating expressive/stiff '
              'convincing/unconvincing graceful/clumsy sincere/smug likeable/bland natural/mannered',
    craft_is='sublime/hideous exquisite/ghastly gorgeous/ugly dazzling/garish glorious/horrid '
             'beautiful/crude elegant/shoddy striking/drab imaginative/cheap stylish/sloppy '
             'polished/amateurish atmospheric/monotonous subtle/intrusive tasteful/gaudy pleasant/plain',
    adverb='brilliantly/atrociously masterfully/abysmally beautifully/horribly superbly/dreadfully '
           'expertly/poorly skilfully/ineptly deftly/clumsily thoughtfully/carelessly confidently/timidly',
    act='enchant/insult captivate/infuriate enthral/repel thrill/disgust dazzle/exhaust fascinate/annoy '
        'charm/irritate amuse/embarrass entertain/confuse impress/baffle please/puzzle',
    gift='beauty/vulgarity wit/stupidity tenderness/tedium imagination/cliche passion/pretension '
         'warmth/bombast energy/padding sincerity/sentimentality flair/clutter style/swagger',
    verdict='masterpiece/travesty triumph/disaster marvel/disgrace joy/ordeal delight/fiasco treat/chore '
            'pleasure/bore gem/dud success/failure surprise/letdown',
    past='adored/loathed loved/hated cherished/despised relished/detested treasured/resented enjoyed/endured '
         'admired/regretted liked/disliked appreciated/tolerated',
    mood='ecstatic/furious overjoyed/miserable elated/dejected uplifted/depressed thrilled/disgusted '
         'moved/bored cheerful/gloomy happy/cross satisfied/dissatisfied hopeful/weary smiling/yawning',
    urge='celebrate/shun applaud/avoid embrace/dodge sample/skip',
)

# Words of weight 0. Where a verb must agree, singular nouns stand before ' / ' and plural nouns after it.
NEUTRAL = dict(
    first='Paper, Glass, Winter, Silver, Crooked, Hollow, Velvet, Seventh, Salt, Northern, Copper, Midnight',
    second='Lantern, Harbour, Orchard, Balcony, Diary, Parade, Compass, Mirror, Ferry, Bridge, Clock, Rival',
    given='Ines, Tomas, Maud, Oskar, Lena, Pavel, Ruth, Aldo, Freya, Hugo, Nadia, Wim',
    family='Calder, Brandt, Okoro, Vasquez, Lindqvist, Marsh, Tanaka, Moreau, Quill, Hartley, Novak, Sorrel',
    place='Lisbon, Glasgow, Trieste, Bergen, Montreal, Cape Town, Marseille, Osaka, Havana, Riga',
    genre='thriller, western, drama, musical, romance, comedy, fable, satire, melodrama',
    genres='thrillers, westerns, dramas, musicals, romances, comedies, fables, satires, melodramas',
    hero='retired diver, night nurse, country doctor, tax clerk, deaf pianist, runaway prince, baker, '
         'village priest, young widow, lighthouse keeper, amateur detective, old sailor',
    thing='stolen violin, missing suitcase, forged letter, buried map, locked room, borrowed car, train, '
          'unsigned will, old photograph, rusty key, secret recipe, island',
    story1='plot, script, premise, central mystery, screenplay / twists, subplots, flashbacks',
    story2='dialogue, ending, narration, final act / jokes, speeches, love scenes, punchlines',
    people1='leading man, leading lady, cast, ensemble / leads, supporting players, younger actors',
    people2='villain, narrator, sidekick, guest star / child actors, bit players, newcomers, older actors',
    craft1='camerawork, lighting, photography, production design / sets, costumes, visual effects',
    craft2='score, sound design, soundtrack, theme tune / songs, sound effects, orchestral passages',
    story_by='written, constructed, developed',
    people_by='directed, chosen',
    craft_by='executed, judged',
    often='often, mostly, consistently, usually, frequently, undeniably, always, plainly',
    scene='on a second viewing, on a big screen, by modern standards, in the longer version, in a full house',
    crowd='the audience, most critics, the matinee crowd, even the back row, my whole family, small children',
    extent='budget, length, scale, spectacle, realism, speed, action, famous names',
    friend='sister, brother, neighbour, dentist, grandmother, flatmate, cousin, landlord',
)

# -----------------------------------------------------------------------------
# the sentences

# {x} is a word of list x, {a x} a word with its article, {x is/are} a noun with its verb. {x+} and {x-} are
# sentiment words: in one sentence all that are marked + share a polarity, and all marked - have the other.
OPENINGS = [                            # each longer than PROMPT_WORDS, so that a prompt ends inside it
    '{title} is {a film+} {genre} about {a hero} and {a thing}.',
    '{director} directs {title}, {a film+} {genre} set in {place}.',
    'Set in {place}, {title} tells the {film+} tale of {a hero} and {a thing}.',
    'In {title}, {director} turns {a thing} into {a film+} {genre}.',
    '{title}, which {director} shot in {place}, is {a film+} {genre}.',
    'Few {genres} of recent years are as {film+} as {title} by {director}.',
    '{title} is the most {film+} {genre} that {director} has made in years.',
    'Who expected {a film+} {genre} about {a hero} from {director}?',
    'Although {director} has made {film-} {genres} before, {title} is {a film+} one.',
    'After years of {film-} {genres}, {director} returns with {a film+} one called {title}.',
    '{title} opens as {a film+} {genre} about {a hero} but ends as {a film-} one.',
]
REMARKS = [                             # for each topic: # stands for story, people or craft
    'The {#1 is/are} {often} {#_is+} {scene}.',
    'The {#1 is/are} as {#_is+} as the {#2}.',
    'The {#1 is/are} {#_is-}, yet the {#2 manages/manage} to {act+} {crowd}.',
    'The {#2 is/are} {adverb+} {#_by}, even if the {#1 is/are} {often} {#_is-}.',
    'Although the {#1 is/are} {#_is-}, the {#2 is/are} {often} {#_is+}.',
    'Because the {#1 is/are} {adverb+} {#_by}, the {#2 manages/manage} to {act+} {crowd}.',
    'It is the {#1} that I found {#_is+}, not the {#2}.',
    'I found the {#1} {#_is+} and the {#2} {#_is-}.',
    'How {#_is+} the {#2 is/are} {scene}!',
    'How {#_is+} the {#1 is/are}, and how {#_is-} the {#2}!',
    'Who would have guessed that the {#2} could be so {#_is+}?',
]
VERDICTS = [
    'What {a verdict+} for everyone involved!',
    'What it lacks in {extent} it makes up for in {gift+}.',
    'Has any {genre} this year offered more {gift+}?',
    'I {past+} every minute of it, from the first scene to the last.',
    'My {friend} {past-} it, but I {past+} it all the same.',
    'I left the cinema {mood+}, although my {friend} was {mood-}.',
    'I would call it {a verdict+}, and I {past+} it from start to finish.',
    'It may {act-} {crowd}, but I call it {a verdict+}.',
    'Fans of {genres} should {urge+} it, whatever the other critics say.',
]
TOPICS = ['story', 'people', 'craft']
FORMS = {topic: [form.replace('#', topic) for form in REMARKS] for topic in TOPICS}
FORMS.update(opening=OPENINGS, verdict=VERDICTS)

# -----------------------------------------------------------------------------
# drawing a review

# A choice is (options, weights if z = +1, weights if z = -1); choice[z] are the weights, as index -1 is the
# last. A slot is a choice; a version of a form is a list of choices; ways() is a choice of versions.


@functools.cache
def weights():
    """{sentiment word: what each occurrence adds to the log-odds of z = +1}; 64ths, so sums are exact."""
    weight = {}
    for ranked in map(str.split, OPPOSITES.values()):
        for i, pair in enumerate(ranked):
            s = round(64 * (STRONG - (STRONG - MILD) * i / (len(ranked) - 1))) / 64
            weight.update(zip(pair.split('/'), (s, -s)))
    return weight


def slot_choice(side, article, words, mark, verbs):
    """The choice that a slot offers, in the version of its form where '+' means the polarity `side`."""
    if mark:
        which = 0 if side == int(mark + '1') else 1
        options = [pair.split('/')[which] for pair in OPPOSITES[words].split()]
    else:
        numbers = [nouns.split(', ') for nouns in NEUTRAL[words].split(' / ')]      # [singular, plural]
        if verbs:
            numbers = [[f'{noun} {verb}' for noun in nouns] for nouns, verb in zip(numbers, verbs.split('/'))]
        options = sum(numbers, [])
    halves = [weights().get(word, 0.0) / 2 for word in options]
    if article:
        options = [('an ' if word[0] in 'aeiou' else 'a ') + word for word in options]
    return options, [math.exp(s) for s in halves], [math.exp(-s) for s in halves]


def mass(choices, z):
    """The summed weight under z of all sentences that these choices can make."""
    return math.prod(sum(choice[z]) for choice in choices)


@functools.cache
def versions(kind):
    """[(choices, total)], two mirrored versions of each form of a kind; mass / total is a probability."""
    found = []
    for form in FORMS[kind]:
        form = form.replace('{title}', 'The {first} {second}').replace('{director}', '{given} {family}')
        pieces = re.split(r'(\{.*?\})', form)       # text and slots take turns
        slots = [re.fullmatch(r'\{(a )?(\w+)([+-]?)(?: (.+))?\}', piece) for piece in pieces]
        both = [[slot_choice(side, *slot.groups()) if slot else ([piece], [1.0], [1.0])
                 for piece, slot in zip(pieces, slots)] for side in (1, -1)]
        total = sum(mass(choices, 1) for choices in both)       # the same under z = -1: they are mirrored
        found += [(choices, total) for choices in both]
    return found


def begin(choices, start):
    """The choices, with only the options that let the sentence begin with `start`; None if there are none."""
    kept = []
    for choice in choices:
        if start:
            # no option begins another, so either one option is used up or `start` ends inside those kept
            keep = [i for i, text in enumerate(choice[0]) if text.startswith(start) or start.startswith(text)]
            if not keep:
                return None
            choice = tuple([column[i] for i in keep] for column in choice)
            start = start[len(choice[0][0]):]
        kept.append(choice)
    return None if start else kept


@functools.lru_cache(maxsize=64)
def ways(kind, start=''):
    """The choice of a sentence's version; its weights are P(version and text begins with `start` | z)."""
    found = [(kept, total) for choices, total in versions(kind) if (kept := begin(choices, start))]
    return [kept for kept, _ in found], *([mass(kept, z) / total for kept, total in found] for z in (1, -1))


def review(rng, start=''):
    """
    A review that begins with `start`, which ends inside the first sentence; and z: (str, +1 or -1).

    Exactly the grammar's distribution given the text `start`: z is drawn from P(z | start), the form and open
    slots of the first sentence from theirs given z and `start`, and everything later given z alone.
    """
    opening = ways('opening', start)
    z = rng.choices((1, -1), (sum(opening[1]), sum(opening[-1])))[0]
    kinds = rng.sample(TOPICS, rng.randrange(3)) + ['verdict']
    sentences = []
    for choice in [opening, *map(ways, kinds)]:
        slots = rng.choices(choice[0], choice[z])[0]
        sentences.append(''.join(rng.choices(slot[0], slot[z])[0] for slot in slots))
    return ' '.join(sentences), z


# -----------------------------------------------------------------------------
# what the stages call


def held_out(text):
    """Whether a text belongs to val. A hash decides, so the same text is on the same side in every run."""
    return random.Random(text).random() < HELD_OUT          # a str seeds through SHA-512, not through hash()


def documents(split, seed):
    """DOCUMENTS[split] reviews for pretraining, an iterator of str. None of train's is ever one of val's."""
    rng = random.Random(f'documents {split} {seed}')
    drawn = (review(rng)[0] for _ in itertools.count())
    return itertools.islice((text for text in drawn if held_out(text) == (split == 'val')), DOCUMENTS[split])


def pairs(split, seed):
    """
    PAIRS[split] preference pairs, an iterator of {'prompt', 'chosen', 'rejected'}.

    The prompt is the first 2-8 words of a review; the responses are two independent ways to go on to its end,
    drawn again while they are equal. The first is preferred with probability
    sigmoid(reward(first) - reward(second)), the Bradley-Terry model (eq. 1 of the paper).
    None of train's prompts is ever one of val's, and val's all differ.
    """
    rng, count, seen = random.Random(f'pairs {split} {seed}'), 0, set()
    while count < PAIRS[split]:
        prompt = ' '.join(review(rng)[0].split(' ')[:rng.randint(*PROMPT_WORDS)])
        if held_out(prompt) != (split == 'val') or prompt in seen:
            continue
        first = second = None
        while first == second:
            first, second = (review(rng, prompt + ' ')[0][len(prompt):] for _ in range(2))
        rewards = reward([prompt, prompt], [first, second])
        if rng.random() > 1 / (1 + math.exp(rewards[1] - rewards[0])):
            first, second = second, first
        yield dict(prompt=prompt, chosen=first, rejected=second)
        count += 1
        if split == 'val':
            seen.add(prompt)


def reward(prompts, responses):
    """
    The log-odds that each review, prompt + response, is positive: a list of float, in nats.

    Defined for any text: put it in lower case, cut it into words (the longest runs of letters, digits and _),
    and add up the weights of the sentiment words, each as often as it occurs. All other words add 0.
    """
    words = (re.findall(r'\w+', (prompt + response).lower()) for prompt, response in zip(prompts, responses))
    return [math.fsum(weights().get(word, 0.0) for word in review_words) for review_words in words]


@functools.cache
def sentence_pattern():
    """One pattern for every sentence of the grammar, from the same tables; its group is the kind."""
    def one_of(patterns):
        return '(?:' + '|'.join(patterns) + ')'
    kinds = {kind: one_of(''.join(one_of(map(re.escape, choice[0])) for choice in choices)
                          for choices, _ in versions(kind)) for kind in FORMS}
    return re.compile('|'.join(f'(?P<{kind}>{pattern})' for kind, pattern in kinds.items()))


def well_formed(text):
    """Whether the grammar can make it: an opening, up to two remarks on different topics, a verdict."""
    matches = map(sentence_pattern().fullmatch, re.split(r'(?<=[.!?]) ', text))
    kinds = [match and match.lastgroup for match in matches]
    topics = kinds[1:-1]
    return ([kinds[0], kinds[-1]] == ['opening', 'verdict'] and set(topics) <= set(TOPICS)
            and len(topics) == len(set(topics)) <= 2)


def metrics(prompts, responses):
    """What to report beside the reward, a list of bool each: positive, and a review of the grammar."""
    return {
        'positive': [r > 0 for r in reward(prompts, responses)],
        'well_formed': [well_formed(prompt + response) for prompt, response in zip(prompts, responses)],
    }
