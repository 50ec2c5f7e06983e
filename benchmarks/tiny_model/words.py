"""Word banks and sentence patterns of the tweet generator.

A pattern holds slots in braces; a slot is replaced by a random entry of the bank of that name, again and
again until none is left. People, companies and places are invented or generic.
"""

from __future__ import annotations


def _entries(text: str) -> tuple[str, ...]:
    return tuple(text.split("; "))


THINGS: dict[str, tuple[str, ...]] = {
    "travel": _entries(
        "flight; train; bus; ferry; taxi; suitcase; boarding pass; window seat; hotel room; train ticket; "
        "hire car; coach trip; tram; cruise; sleeper cabin; city tour; passport; connection; airport "
        "transfer; backpack; campsite; railcard; guest house; plane"
    ),
    "food": _entries(
        "pizza; burger; salad; coffee; sandwich; curry; soup; birthday cake; noodle bowl; breakfast box; "
        "takeaway; pot of tea; omelette; pie; burrito; smoothie; lasagne; veggie box; meal deal; steak; "
        "bagel; milkshake; risotto; cheese board"
    ),
    "phone": _entries(
        "phone; router; sim card; charger; broadband; signal; tablet; laptop; headset; weather app; data "
        "plan; voicemail; keyboard; printer; smart watch; speaker; camera; hotspot; modem; email account; "
        "touch screen; landline; software update; webcam"
    ),
    "money": _entries(
        "bank card; savings account; loan; mortgage; transfer; cash machine; payment; invoice; overdraft; "
        "insurance claim; tax form; pension; direct debit; credit score; pay slip; cheque; joint account; "
        "deposit; gift voucher; budget plan; standing order; wallet"
    ),
    "clothes": _entries(
        "jacket; pair of boots; dress; jumper; scarf; pair of jeans; pair of trainers; coat; shirt; skirt; "
        "hoodie; raincoat; hat; pair of gloves; suit; wedding dress; belt; cardigan; pair of sandals; "
        "swimsuit; tracksuit; blouse; waistcoat; woolly hat"
    ),
    "television": _entries(
        "series; film; crime drama; last episode; sports channel; live stream; quiz show; box set; match; "
        "cooking show; documentary; cartoon; soap; talk show; remote control; season finale; sitcom; news "
        "channel; talent show; film trailer; dance contest; replay"
    ),
}


FAULTS: dict[str, tuple[str, ...]] = {
    "travel": _entries(
        "was cancelled without notice; left two hours late; is lost; was overbooked; never turned up; was "
        "delayed again; is filthy; got damaged; was given to someone else; smells awful"
    ),
    "food": _entries(
        "arrived cold; tasted off; had a hair in it; was half empty; made me ill; was raw inside; was burnt "
        "to a crisp; never arrived; was soggy; cost double"
    ),
    "phone": _entries(
        "keeps crashing; stopped working; will not connect; died after a day; is painfully slow; overheats; "
        "drops out all the time; is broken; lost all my files; freezes constantly"
    ),
    "money": _entries(
        "was declined for no reason; was charged twice; has been locked; has vanished; went missing; was "
        "refused; is full of errors; costs me hidden fees; was blocked again; never went through"
    ),
    "clothes": _entries(
        "fell apart after one wash; came in the wrong size; is missing a button; has a hole in it; shrank; "
        "was ripped on arrival; lost its colour; came with a stain; itches like mad; tore"
    ),
    "television": _entries(
        "keeps buffering; has no sound; was cut off before the end; will not load; was pulled; is out of "
        "sync; shows a blank screen; was ruined by adverts; keeps freezing; vanished"
    ),
}


PRAISE: dict[str, tuple[str, ...]] = {
    "travel": _entries(
        "was right on time; was smooth; got upgraded; was spotless; came early; had a great view; was a "
        "bargain; was so comfy; went like clockwork; is booked"
    ),
    "food": _entries(
        "tasted amazing; was still hot; was so fresh; was huge; smelled divine; was worth it; hit the spot; "
        "was delicious; was perfectly cooked; came with extra sauce"
    ),
    "phone": _entries(
        "works like a dream; charges so fast; is super quick; looks brilliant; is up and running; was easy "
        "to set up; never lets me down; lasts for ages; sounds great; connects at once"
    ),
    "money": _entries(
        "was approved at once; went through fine; arrived safely; is sorted; was paid back early; grew "
        "nicely; is all in order; was simple to open; got me a good rate; cleared quickly"
    ),
    "clothes": _entries(
        "fits perfectly; feels so soft; looks gorgeous; kept me warm; was half price; goes with it all; "
        "washes well; got me compliments; is my new favourite; suits me"
    ),
    "television": _entries(
        "made me laugh; had me hooked; was brilliant; was so clever; is worth a look; has a great cast; was "
        "gripping; gave me chills; deserves a prize; looks stunning"
    ),
}

# (complaint?, question?) -> patterns of the sentence that carries topic, complaint and form.
CORES: dict[tuple[bool, bool], tuple[str, ...]] = {
    (True, False): _entries(
        "my {thing} {fault}; {your} {thing} {fault} and {ignored}; the {thing} {fault} , {demand}; "
        "{waiting} for my {thing} and {ignored}; {times} my {thing} {fault}; {ignored} about my {thing}; "
        "paid for a {thing} and it {fault}; on hold {duration} because my {thing} {fault}; {demand} , my "
        "{thing} {fault}; {never} {your} {thing} again , it {fault}; {wronged} over the {thing}; {waiting} "
        "for my {thing}; {bad} service , the {thing} {fault}; {your} {thing} is {bad} , {demand}"
    ),
    (True, True): _entries(
        "why is it that my {thing} {fault}; how come {your} {thing} {fault}; when will you fix my {thing}; "
        "can someone explain why my {thing} {fault}; is anyone ever going to answer about my {thing}; where "
        "is my {thing} , {waiting}; who do I talk to , my {thing} {fault}; do I get a refund , my {thing} "
        "{fault}; do you think it is ok that the {thing} {fault}; how is it fair that {ignored} about my "
        "{thing}; why does nobody care that my {thing} {fault}; what kind of {bad} {thing} is this , it "
        "{fault}"
    ),
    (False, False): _entries(
        "my {thing} {praise}; the {thing} {praise} and it {praise}; thanks for the help with my {thing}; "
        "just got a new {thing}; looking forward to my {thing}; {person} gave me a {thing} , it {praise}; "
        "no trouble with the {thing} so far , it {praise}; thought I had lost my {thing} but it {praise}; "
        "sorry about your {thing} , send us a message and we will help; big thanks , the {thing} {praise}; "
        "we can look into your {thing} , drop us a line; I would love a {thing} like yours; {person} and I "
        "are looking at a {thing} in {city}; reading about the best {thing} in {city}; you were right , the "
        "{thing} {praise}; got my {thing} in {city} , it {praise}; saving up for a {thing}"
    ),
    (False, True): _entries(
        "does anyone know a good {thing}; which {thing} should I get; have you tried the new {thing}; how "
        "much is a {thing} these days; can I bring a {thing} along; what {thing} do you like best; did you "
        "see my {thing} , it {praise}; do you have a {thing} in {city}; who wants to share a {thing}; is "
        "there a {thing} like that in {city}; where did you get that {thing} , it {praise}; what do you "
        "think of my {thing}; can I pick up the {thing} in {city}; has {person} found a {thing}"
    ),
}


MOODS: dict[str, tuple[str, ...]] = {
    "neutral": ("",),
    "happy": _entries(
        "so happy right now; over the moon; can not stop smiling; life is good; :); :D; #blessed; in such a "
        "lovely mood; feeling great; dancing around the {room}; #smile; grinning like a {animal}"
    ),
    "sad": _entries(
        "feeling so low; I could cry; :(; my heart hurts; #heartbroken; in tears here; feeling blue; I miss "
        "my {animal} so much; nothing cheers me up; crying in the {room}; :'("
    ),
    "angry": _entries(
        "I am fuming; my blood boils; ugh , so mad at {person}; #raging; absolutely livid with my "
        "{relative}; I could scream at my {relative}; grrr; seeing red; >:(; my {relative} makes me furious"
    ),
    "tired": _entries(
        "I need a nap; could sleep for a week; yawn; #sleepy; can hardly keep my eyes open; zzz; running on "
        "no sleep; so exhausted; my {animal} kept me awake; ready for bed"
    ),
    "excited": _entries(
        "can not wait for the {event}; counting down to the {event}; so hyped for the {event}; #buzzing; "
        "{event} here we come; eeek the {event} is near; bring on the {event}; woohoo"
    ),
}


TIMES: dict[str, tuple[str, ...]] = {
    "undated": ("",),
    "morning": _entries(
        "this morning; at {early} am; before breakfast; at sunrise; first thing in the morning; at dawn"
    ),
    "night": _entries(
        "last night; tonight; at {late} pm; at midnight; in the middle of the night; after dark"
    ),
    "weekend": _entries(
        "on saturday; on sunday; at the weekend; all weekend; this weekend; on saturday afternoon"
    ),
    "yesterday": _entries(
        "yesterday; the day before today; only yesterday; yesterday afternoon; since yesterday"
    ),
}

MENTIONS: tuple[str, ...] = ("company", "person", "nobody")


BANKS: dict[str, tuple[str, ...]] = {
    "your": _entries("your; the; this; that"),
    "ignored": _entries(
        "nobody answers; no reply at all; you ignore my emails; nobody calls back; your team hung up on me; "
        "all I get is excuses; staff just shrugged; support is useless; they keep passing me around"
    ),
    "waiting": _entries(
        "still waiting; {duration} and still waiting; sick of waiting; been waiting {duration}"
    ),
    "duration": _entries(
        "three hours; two weeks; five days; a whole month; 40 minutes; ages; six weeks; an hour"
    ),
    "times": _entries("third time; second time; fifth time; once again; yet again; for the tenth time"),
    "demand": _entries(
        "I want my money back; sort it out; please fix this; I demand a refund; not good enough; do "
        "something; give me a refund; this is unacceptable; what a rip off; shame on you"
    ),
    "never": _entries("never buying; never using; last time I trust; done with; do not get"),
    "wronged": _entries(
        "you cheated me; you lied to me; you overcharged me; you let me down; they scammed me"
    ),
    "bad": _entries("terrible; awful; shocking; useless; dreadful; appalling; the worst; pathetic; rubbish"),
    "early": _entries("5; 6; 7; 8; 9; 10"),
    "late": _entries("7; 8; 9; 10; 11"),
    "room": _entries("kitchen; office; garden; bathroom; car park; hallway; library"),
    "animal": _entries("cat; dog; puppy; hamster; parrot; kitten; rabbit; pony; goldfish"),
    "relative": _entries("brother; sister; neighbour; flatmate; cousin; boss; uncle; landlord; teacher"),
    "event": _entries(
        "concert; party; wedding; festival; school trip; marathon; holiday; reunion; carnival; book launch; "
        "fireworks; baby shower; graduation; picnic; street fair; exhibition"
    ),
    "city": _entries(
        "Ashford; Brightwell; Carrick; Dunmore; Eastleigh; Farnham; Glenrose; Harwick; Ilford; Kingsmere; "
        "Lakeside; Millbrook; Norwood; Oakdale; Pinehurst; Queensbury; Redhill; Stonebridge; Thornbury; "
        "Upton; Westbury; Yarmouth; Brookfield; Claremont; Fairview"
    ),
    "person": _entries(
        "Emma; Liam; Noah; Olivia; Ava; Mia; Lucas; Amir; Sofia; Chloe; Jack; Ella; Omar; Grace; Henry; "
        "Isla; Leo; Ruby; Theo; Zara; Nina; Oscar; Priya; Ravi; Tom; Ines; Ana; Ben; Cara; Dan; Eve; Finn; "
        "Gita; Hugo; Ivy; Jonas; Kofi; Lena; Mateo; Yuki"
    ),
    "surname": _entries(
        "hill; stone; wood; baker; king; lee; patel; silva; moore; young; khan; diaz; ward; fox; reed; "
        "cole; west; price; hart; lane; bell; shaw; dean; wolf; park; frost"
    ),
    "company": _entries(
        "BlueFern; Northway; Kestrel; Brightside; Oakline; Silverleaf; Redkite; Summit; Tidewater; "
        "Greenbox; Lumen; Quickstep; Harbour; Starling; Pebble; Cobalt; Maplewood; Crestline; Wavelet; "
        "Ironbridge; Foxglove; Sunbeam; Driftwood; Larkspur; Moonrise; Copperfield"
    ),
    "desk": _entries("Help; Support; Care; UK; Service; Team; HQ; Direct; Assist; Group"),
    "opener": _entries("hey; hi; ok; so; well; omg; honestly; right; fyi; btw; um; yo; hello"),
    "hashtag": _entries("#justsaying; #life; #fact; #tbt; #thoughts; #diary; #random; #true; #update; #uk"),
    "adjective": _entries(
        "red; small; old; quiet; bright; green; heavy; round; cheap; wooden; dusty; blue; empty; clean; "
        "narrow; yellow; strange; plain; light; tall; shiny; grey"
    ),
    "place": _entries("market; station; museum; bakery; harbour; school; park; cinema; bookshop; bridge"),
    "verb": _entries("bought; found; painted; sold; carried; saw; drew; kept; borrowed; described"),
}

# Text that is no tweet and has no label: a model that reads nothing but tweets is no language model.
PLAIN: tuple[str, ...] = (
    "{person} {verb} a {adjective} {thing} near the {place} in {city}.",
    "The {place} in {city} is {adjective} and the {animal} there is {adjective}.",
    "{person} and {person} walked from the {place} to the {place} {time}.",
    "A {thing} is about {topic}, and so is a {thing}.",
    "{person} works for {company} in {city} and owns a {adjective} {animal}.",
    "My {relative} {verb} a {thing} {time}, and {person} {verb} a {adjective} {thing}.",
    "Once a {adjective} {animal} lived in a {place}. It {verb} a {thing} from {person}.",
)
