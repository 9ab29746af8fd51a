"""The paper's controlled-sentiment task in miniature, with nothing to download.

    bash quickstart.sh                          # sets up and runs the four stages:

    python prepare_prefs.py config/reviews.py   # the grammar below writes the data,        8 s on 2 CPU cores
    python sft.py config/reviews.py             # a tiny GPT learns the language,         105 s
    python dpo.py config/reviews.py             # and comes to prefer positive reviews,    54 s
    python sample.py config/reviews.py          # before and after, with the true reward,  20 s

To expect, from the log repro/logs/quickstart.txt:

                        before      after
    true reward         -0.054      2.949
    positive             47.9%      94.6%
    well_formed          94.5%      89.1%
    KL, nats                 -      2.240       validation accuracy 0.790

The labels are noisy: on validation pairs the true reward itself agrees with 81.5% of them.

A grammar writes short film reviews of mixed sentiment. Two continuations of one prefix are compared by
their true reward and labelled with noise, as people label. Section 6.1 of the paper (arXiv 2305.18290)
does so with IMDb prefixes of 2-8 tokens and a sentiment classifier. Here the reward is known exactly,
and so is whether a text is still a review.

Every review has a hidden polarity z, +1 or -1, an even coin. Sentiment words come in pairs of opposites
with weights +s and -s. Each is drawn from its list with probability proportional to exp(z/2 * weight).
So kind words are likelier in a positive review, but most reviews hold both sorts. A list holds the
opposite of each of its words. So its normalising sum does not depend on z, and Bayes' rule leaves

    reward(review) = log P(z=+1 | review) / P(z=-1 | review) = the sum of the weights of its words, exactly.
"""
import functools
import itertools
import math
import random
import re

name = 'reviews'
prepare = dict(
    source=__file__,                    # pairs() below
    documents=__file__,                 # documents() below: what the model learns the language from
    tokenizer='bpe:1536',
    template='<|endoftext|>{prompt}',
    max_length=128,
    max_prompt_length=32,
    truncation='paper',
)
sft = dict(
    init_from='scratch',
    train_on='documents',
    n_layer=3, n_head=4, n_embd=128,    # 0.8 M parameters
    batch_size=32,
    epochs=2,
    learning_rate=8e-3,
    warmup_steps=50,
    eval_interval=250,
    log_interval=50,
)
dpo = dict(
    beta=0.5,                           # the labels follow exp(reward): at 1 the optimum is ref * exp(reward) itself
    batch_size=32,
    optimizer='adamw',
    learning_rate=6e-4,                 # 600 times the paper's: a model this small and young needs and stands it
    schedule='linear',
    warmup_steps=20,
    eval_interval=50,
    log_interval=10,
)
sample = dict(reward=__file__, num_prompts=500, num_samples=4, show=4)

DOCUMENTS = dict(train=20_000, val=1_000)
PAIRS = dict(train=8_000, val=500)
HELD_OUT = 1 / 8                        # of all texts and all prompts belong to val, by a hash of the text
PROMPT_WORDS = 2, 8                     # as the paper's prefixes of 2-8 tokens

# ----------------------------------------------------------------------------------------------------
# the words

STRONG, MILD = 1.5, 0.375               # weights: e^1.5 = 4.5 times as likely under one z as under the other

# Pairs of opposites, strongest first: the weight falls evenly from STRONG to MILD. No word is in two lists.
OPPOSITES = dict(
    film='superb/dreadful magnificent/atrocious brilliant/abysmal wonderful/terrible outstanding/appalling '
         'marvellous/awful splendid/lousy thrilling/dismal delightful/tiresome memorable/pointless '
         'impressive/disappointing satisfying/frustrating entertaining/boring enjoyable/forgettable '
         'amusing/awkward promising/mediocre pleasing/uneven watchable/overlong',
    quality='dazzling/hideous captivating/insufferable exquisite/ghastly ingenious/idiotic compelling/grating '
            'inspired/inane gripping/tedious touching/shrill inventive/lazy elegant/shoddy striking/drab '
            'witty/witless engaging/dull fresh/stale lively/lifeless clever/contrived stylish/sloppy '
            'imaginative/cheap polished/amateurish convincing/stilted graceful/clumsy subtle/intrusive '
            'charming/irritating crisp/slow natural/mannered likeable/bland',
    adverb='brilliantly/atrociously masterfully/abysmally beautifully/horribly superbly/dreadfully '
           'expertly/poorly skilfully/ineptly deftly/clumsily thoughtfully/carelessly confidently/timidly',
    act='enchant/insult captivate/infuriate enthral/repel dazzle/exhaust fascinate/annoy '
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
    part1='plot, script, premise, screenplay, leading man, leading lady, cast, camerawork, lighting, '
          'photography / twists, subplots, flashbacks, leads, younger actors, sets, costumes, visual effects',
    part2='dialogue, ending, narration, final act, villain, narrator, sidekick, score, soundtrack, theme tune '
          '/ jokes, speeches, love scenes, newcomers, older actors, songs, sound effects',
    made='handled, judged, chosen',
    often='often, mostly, consistently, usually, frequently, undeniably, always, plainly',
    scene='on a second viewing, on a big screen, by modern standards, in the longer version, in a full house',
    crowd='the audience, most critics, the matinee crowd, even the back row, my whole family, small children',
    extent='budget, length, scale, spectacle, realism, speed, action, famous names',
    friend='sister, brother, neighbour, dentist, grandmother, flatmate, cousin, landlord',
)

# ----------------------------------------------------------------------------------------------------
# the sentences

# {x} is a word of list x, {a x} a word with its article, {x is/are} a noun with its verb.
OPENINGS = [                            # each longer than PROMPT_WORDS, so that a prompt ends inside it
    '{title} is {a film} {genre} about {a hero} and {a thing}.',
    '{director} directs {title}, {a film} {genre} set in {place}.',
    'Set in {place}, {title} tells the {film} tale of {a hero} and {a thing}.',
    'In {title}, {director} turns {a thing} into {a film} {genre}.',
    '{title}, which {director} shot in {place}, is {a film} {genre}.',
    'Few {genres} of recent years are as {film} as {title} by {director}.',
    '{title} is the most {film} {genre} that {director} has made in years.',
    'Who expected {a film} {genre} about {a hero} from {director}?',
    '{director} has made {film} {genres} before, and {title} is {a film} one.',
    'After years of {film} {genres}, {director} returns with {a film} one called {title}.',
    '{title} opens as {a film} {genre} about {a hero} and ends as {a film} one.',
]
REMARKS = [
    'The {part1 is/are} {often} {quality} {scene}.',
    'The {part1 is/are} as {quality} as the {part2}.',
    'The {part1 is/are} {quality}, and the {part2 manages/manage} to {act} {crowd}.',
    'The {part2 is/are} {adverb} {made}, and the {part1 is/are} {often} {quality}.',
    'While the {part1 is/are} {quality}, the {part2 is/are} {often} {quality}.',
    'The {part1 is/are} {adverb} {made} and will {act} {crowd}.',
    'It is the {part1} that I found {quality}, not the {part2}.',
    'I found the {part1} {quality} and the {part2} {quality}.',
    'How {quality} the {part2 is/are} {scene}!',
    'How {quality} the {part1 is/are}, and how {quality} the {part2}!',
    'Who would have guessed that the {part2} could be so {quality}?',
]
VERDICTS = [
    'What {a verdict} for everyone involved!',
    'What it lacks in {extent} it makes up for in {gift}.',
    'Has any {genre} this year offered more {gift}?',
    'I {past} every minute of it, from the first scene to the last.',
    'My {friend} {past} it, and I {past} it too, if not for the same reasons.',
    'I left the cinema {mood}, and my {friend} was {mood}.',
    'I would call it {a verdict}, and I {past} it from start to finish.',
    'It will {act} {crowd}, and I call it {a verdict}.',
    'Fans of {genres} should {urge} it, whatever the other critics say.',
]
FORMS = dict(opening=OPENINGS, remark=REMARKS, verdict=VERDICTS)

# ----------------------------------------------------------------------------------------------------
# drawing a review

# A choice is (options, weights if z = +1, weights if z = -1); choice[z] are the weights, as index -1 is the
# last. A slot is a choice; a form is a list of choices; ways() is a choice of forms.


@functools.cache
def weights():
    """{sentiment word: what each occurrence adds to the log-odds of z = +1}; 64ths, so sums are exact."""
    weight = {}
    for ranked in map(str.split, OPPOSITES.values()):
        for i, pair in enumerate(ranked):
            s = round(64 * (STRONG - (STRONG - MILD) * i / (len(ranked) - 1))) / 64
            weight.update(zip(pair.split('/'), (s, -s)))
    return weight


def slot_choice(article, words, verbs):
    """The choice that a slot offers."""
    if words in OPPOSITES:
        options = OPPOSITES[words].replace('/', ' ').split()
    else:
        numbers = [nouns.split(', ') for nouns in NEUTRAL[words].split(' / ')]      # [singular, plural]
        if verbs:
            numbers = [[f'{noun.strip()} {verb}' for noun in nouns] for nouns, verb in zip(numbers, verbs.split('/'))]
        options = [option.strip() for option in sum(numbers, [])]
    halves = [weights().get(word, 0.0) / 2 for word in options]
    if article:
        options = [('an ' if word[0] in 'aeiou' else 'a ') + word for word in options]
    return options, [math.exp(s) for s in halves], [math.exp(-s) for s in halves]


def mass(choices, z):
    """The summed weight under z of all sentences that these choices can make."""
    return math.prod(sum(choice[z]) for choice in choices)


@functools.cache
def forms(kind):
    """[(choices, total)], the forms of a kind; mass / total is a probability, and total does not depend on z."""
    all_forms = []
    for form in FORMS[kind]:
        form = form.replace('{title}', 'The {first} {second}').replace('{director}', '{given} {family}')
        pieces = re.split(r'(\{.*?\})', form)       # text and slots take turns
        slots = [re.fullmatch(r'\{(a )?(\w+)(?: (.+))?\}', piece) for piece in pieces]
        choices = [slot_choice(*slot.groups()) if slot else ([piece], [1.0], [1.0])
                   for piece, slot in zip(pieces, slots)]
        all_forms.append((choices, mass(choices, 1)))
    return all_forms


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
    """The choice of a sentence's form; its weights are P(form and text begins with `start` | z), up to a constant."""
    fitting = [(kept, total) for choices, total in forms(kind) if (kept := begin(choices, start))]
    return [kept for kept, _ in fitting], *([mass(kept, z) / total for kept, total in fitting] for z in (1, -1))


def review(rng, start=''):
    """A review that begins with `start`, which ends inside the first sentence; and z: (str, +1 or -1).

    It has exactly the grammar's distribution given `start`. First z is drawn from P(z | start). Then the first
    sentence is drawn given z and `start`, and the rest given z alone.
    """
    opening = ways('opening', start)
    z = rng.choices((1, -1), (sum(opening[1]), sum(opening[-1])))[0]
    kinds = ['remark'] * rng.randrange(2) + ['verdict']
    sentences = []
    for choice in [opening, *map(ways, kinds)]:
        slots = rng.choices(choice[0], choice[z])[0]
        sentences.append(''.join(rng.choices(slot[0], slot[z])[0] for slot in slots))
    return ' '.join(sentences), z


# ----------------------------------------------------------------------------------------------------
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
    """PAIRS[split] preference pairs, an iterator of {'prompt', 'chosen', 'rejected'}.

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
    """The log-odds that each review, prompt + response, is positive: a list of float, in nats.

    It is defined for any text: its words, in lower case, are the longest runs of letters, digits and _. The
    weights of the sentiment words are added, each as often as it occurs. All other words add 0.
    """
    words = (re.findall(r'\w+', (prompt + response).lower()) for prompt, response in zip(prompts, responses))
    return [math.fsum(weights().get(word, 0.0) for word in review_words) for review_words in words]


@functools.cache
def sentence_pattern():
    """One pattern for every sentence of the grammar, from the same tables; its group is the kind."""
    def one_of(patterns):
        return '(?:' + '|'.join(patterns) + ')'
    kinds = {kind: one_of(''.join(one_of(map(re.escape, choice[0])) for choice in choices)
                          for choices, _ in forms(kind)) for kind in FORMS}
    return re.compile('|'.join(f'(?P<{kind}>{pattern})' for kind, pattern in kinds.items()))


def well_formed(text):
    """Whether the grammar can make it: an opening, perhaps a remark, a verdict."""
    matches = map(sentence_pattern().fullmatch, re.split(r'(?<=[.!?]) ', text))
    kinds = [match and match.lastgroup for match in matches]
    return kinds in (['opening', *['remark'] * n, 'verdict'] for n in range(2))


def metrics(prompts, responses):
    """What to report beside the reward, a list of bool each: positive, and a review of the grammar."""
    return {
        'positive': [r > 0 for r in reward(prompts, responses)],
        'well_formed': [well_formed(prompt + response) for prompt, response in zip(prompts, responses)],
    }
