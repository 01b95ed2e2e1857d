"""Other relations of a subject that CounterFact asks about: what must not change where one of them was edited."""

from collections.abc import Mapping, Sequence

# By kind of subject: a template that asks a relation, and words that mark CounterFact's templates of that relation.
# Templates without any of them ("{}, the") are ambiguous: nothing else is asked of their subjects.
KINDS: Sequence[Mapping[str, Sequence[str]]] = (
    {  # people
        "{} was born in": ("born", "originally from", "native to", "was from"),
        "{} passed away in": ("died", "passed away", "lost their life", "expired", "life ended", "succumbed"),
        "The mother tongue of {} is": ("mother tongue", "native language", "native speaker", "speaks", "spoke",
                                       "speaker of", "writes in", "language used by"),
        "{} has a citizenship from": ("citizen",),
        "The occupation of {} is": ("profession", "occupation", "works as"),
        "{} plays the instrument": ("instrument", "plays the", "performing on", "performs on", "playing the"),
        "{} worked in the city of": ("worked in", "employment", "employed in", "took up work", "used to work"),
        "{} is employed by": ("works for", "employed by"),
        "The official religion of {} is": ("religion", "follower"),
        "{} works in the field of": ("field of", "area of", "domain of", "expertise", "specializes"),
        "{} plays in the position of": ("position", "plays as"),
    },
    {  # places
        "{} is located in the country of": ("located in", "location of", "can be found", "country of"),
        "{} belongs to the continent of": ("continent",),
        "The twin city of {} is": ("twin city",),
        "The official language of {} is": ("official language", "they understand", "language spoken", "law in"),
        "The capital of {} is": ("capital",),
    },
    {  # things
        "{} is developed by": ("developed by", "product of", "created by", "produced by", "manufactured", "owner"),
        "{} originally aired on": ("debut", "premiere", "aired", "released on"),
        "The original language of {} was": ("original language", "language of {} was", "is written in"),
        "The headquarters of {} is in": ("headquarter", "based in"),
        "{} was founded in": ("founded", "started in", "formed in", "formulated", "created in", "originated"),
        "{} is named after": ("named", "called after"),
    },
)  # fmt: skip


def asked_otherwise(template: str) -> list[str]:
    """Templates of other relations that subjects of a template's kind have; none if its kind is not known."""
    for kind in KINDS:
        own = [asks for asks, marks in kind.items() if any(mark in template for mark in marks)]
        if own:
            return [asks for asks in kind if asks not in own]
    return []
