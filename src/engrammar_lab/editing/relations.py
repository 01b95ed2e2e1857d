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
