"""Other relations of a subject that CounterFact asks about: what must not change where one of them was edited."""

from collections.abc import Mapping, Sequence

# By kind of subject: a template that asks a relation; the same as a question, in words that no probe was fitted on; and
# words that mark CounterFact's templates of that relation. Templates without any of them ("{}, the") are ambiguous:
# nothing else is asked of their subjects.
KINDS: Sequence[Mapping[str, Sequence[str]]] = (
    {  # people
        "{} was born in": ("In which city was {} born?", "born", "originally from", "native to", "was from"),
        "{} passed away in": ("In what town did {} pass away?", "died", "passed away", "lost their life", "expired",
            "life ended", "succumbed"),
        "The mother tongue of {} is": ("What is the first language of {}?", "mother tongue", "native language",
            "native speaker", "speaks", "spoke the language", "speaker of", "writes in", "language used by"),
        "{} has a citizenship from": ("Which country is {} a national of?", "citizen"),
        "The occupation of {} is": ("What is the occupation of {}?", "profession of", "profession is", "occupation",
            "works as"),
        "{} plays in the position of": ("In what position is {} fielded?", "position", "plays as"),
        "{} plays the instrument": ("Which musical instrument does {} play?", "instrument", "plays the",
            "performing on", "performs on", "playing the"),
        "{} worked in the city of": ("What city did {} work in?", "worked in", "employment", "employed in",
            "took up work", "used to work"),
        "{} is employed by": ("What is the company that employs {}?", "works for", "employed by"),
        "The official religion of {} is": ("What is the official religion of {}?", "religion", "follower"),
        "{} works in the field of": ("What is the field of work of {}?", "field of", "area of", "domain of",
            "expertise", "specializes"),
    },
    {  # places
        "{} belongs to the continent of": ("What is the continent of {}?", "continent"),
        "{} is located in the country of": ("Which is the country of {}?", "{} is located in", "{}, located in",
            "which is located in", "location of", "It is located in", "can be found"),
        "The twin city of {} is": ("What is {}'s sister city?", "twin city"),
        "The official language of {} is": ("What language is official in {}?", "official language", "they understand",
            "language spoken", "law in"),
        "The capital of {} is": ("Which town is {}'s capital?", "capital"),
    },
    {  # things
        "{} is developed by": ("What is the name of the company that makes {}?", "developed by", "product of",
            "created by", "produced by", "manufactured", "owner"),
        "{} originally aired on": ("On which network was {} aired?", "debut", "premiere", "aired", "released on"),
        "The original language of {} was": ("What was the language of {}?", "original language", "language of {} was",
            "is written in"),
        "The headquarters of {} is in": ("In what city is the headquarters of {}?", "headquarter", "based in"),
        "{} was founded in": ("In which country was {} founded?", "founded", "started in", "formed in", "formulated",
            "created in", "originate"),
        "{} is named after": ("What is {} named for?", "named", "called after"),
    },
)  # fmt: skip
QUESTIONS = {asks: question for kind in KINDS for asks, (question, *_) in kind.items()}


def relation_of(template: str) -> str | None:
    """The relation that a template asks, called by its template in `KINDS`; None if that is not clear."""
    for kind in KINDS:
        for asks, (_, *marks) in kind.items():
            if any(mark in template for mark in marks):
                return asks
    return None


def asked_otherwise(template: str) -> list[str]:
    """Templates of other relations that subjects of a template's kind have; none if its kind is not known."""
    own = relation_of(template)
    return [asks for kind in KINDS if own in kind for asks in kind if asks != own]
