"""Other relations of a subject that CounterFact asks about: what must not change where one of them was edited."""

from collections.abc import Mapping, Sequence

# By kind of subject: a template that asks a relation, and words that mark CounterFact's templates of that relation.
# Templates without any of them ("{}, the") are ambiguous: nothing else is asked of their subjects.
KINDS: Sequence[Mapping[str, Sequence[str]]] = (
    {  # people
        "{} was born in": ("born", "originally from", "native to", "was from"),
        "{} passed away in": ("died", "passed away", "lost their life", "expired", "life ended", "succumbed"),
        "The mother tongue of {} is": ("mother tongue", "native language", "native speaker", "speaks",
                                       "spoke the language", "speaker of", "writes in", "language used by"),
        "{} has a citizenship from": ("citizen",),
        "The occupation of {} is": ("profession of", "profession is", "occupation", "works as"),
        "{} plays in the position of": ("position", "plays as"),
        "{} plays the instrument": ("instrument", "plays the", "performing on", "performs on", "playing the"),
        "{} worked in the city of": ("worked in", "employment", "employed in", "took up work", "used to work"),
        "{} is employed by": ("works for", "employed by"),
        "The official religion of {} is": ("religion", "follower"),
        "{} works in the field of": ("field of", "area of", "domain of", "expertise", "specializes"),
    },
    {  # places
        "{} belongs to the continent of": ("continent",),
        "{} is located in the country of": ("{} is located in", "{}, located in", "which is located in", "location of",
                                            "It is located in", "can be found"),
        "The twin city of {} is": ("twin city",),
        "The official language of {} is": ("official language", "they understand", "language spoken", "law in"),
        "The capital of {} is": ("capital",),
    },
    {  # things
        "{} is developed by": ("developed by", "product of", "created by", "produced by", "manufactured", "owner"),
        "{} originally aired on": ("debut", "premiere", "aired", "released on"),
        "The original language of {} was": ("original language", "language of {} was", "is written in"),
        "The headquarters of {} is in": ("headquarter", "based in"),
        "{} was founded in": ("founded", "started in", "formed in", "formulated", "created in", "originate"),
        "{} is named after": ("named", "called after"),
    },
)  # fmt: skip

# Each of them as a question, in words that no probe was fitted on.
QUESTIONS: Mapping[str, str] = {
    "{} was born in": "In which city was {} born?",
    "{} passed away in": "In what town did {} pass away?",
    "The mother tongue of {} is": "What is the first language of {}?",
    "{} has a citizenship from": "Which country is {} a national of?",
    "The occupation of {} is": "What is the occupation of {}?",
    "{} plays in the position of": "In what position is {} fielded?",
    "{} plays the instrument": "Which musical instrument does {} play?",
    "{} worked in the city of": "What city did {} work in?",
    "{} is employed by": "What is the company that employs {}?",
    "The official religion of {} is": "What is the official religion of {}?",
    "{} works in the field of": "What is the field of work of {}?",
    "{} belongs to the continent of": "What is the continent of {}?",
    "{} is located in the country of": "Which is the country of {}?",
    "The twin city of {} is": "What is {}'s sister city?",
    "The official language of {} is": "What language is official in {}?",
    "The capital of {} is": "Which town is {}'s capital?",
    "{} is developed by": "What is the name of the company that makes {}?",
    "{} originally aired on": "On which network was {} aired?",
    "The original language of {} was": "What was the language of {}?",
    "The headquarters of {} is in": "In what city is the headquarters of {}?",
    "{} was founded in": "In which country was {} founded?",
    "{} is named after": "What is {} named for?",
}


def relation_of(template: str) -> str | None:
    """The relation that a template asks, called by its template in `KINDS`; None if that is not clear."""
    for kind in KINDS:
        for asks, marks in kind.items():
            if any(mark in template for mark in marks):
                return asks
    return None


def asked_otherwise(template: str) -> list[str]:
    """Templates of other relations that subjects of a template's kind have; none if its kind is not known."""
    own = relation_of(template)
    return [asks for kind in KINDS if own in kind for asks in kind if asks != own]
