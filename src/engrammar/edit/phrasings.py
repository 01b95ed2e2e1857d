"""Common relations in several phrasings each: they tell what asks the same as a fact, and what asks something else.

They were written for this purpose and taken from no benchmark, although plain English is shared with all of them.
"""

from dataclasses import dataclass

from engrammar.edit.forms import is_question


@dataclass(frozen=True, kw_only=True)
class Relation:
    """One question, in several phrasings."""

    kinds: str  # whom or what it can be asked of: p a person, l a place, t a thing, a work or an organization
    phrasings: tuple[str, ...]  # with {} for the subject; they end where the object begins; the first is no question


# What else may be asked of any subject, and a plain text. No test uses them.
OTHERWISE = (
    "{} is a", "{} is best known for", "Many people like {} because", "The name {} comes from", "{} was first",
    "A short history of {} begins", "The population of {} is", "My friend told me about {}, and",
    "In the year 1990, {}", "The colour of {} is", "It is a long way from here to {}, so",
)  # fmt: skip
PLAIN = """The river rises in the hills and flows south for forty miles before it reaches the sea. In spring its
banks are covered with flowers, and farmers bring their cattle down to drink. Two mills once stood near the bridge; both
were closed when the railway came, and today their stones are part of the road. A committee meets every month to decide
how the money of the parish is spent, and its minutes are kept in a cupboard of the town hall. To make the soup, wash
the vegetables, cut them into small pieces, and boil them in salted water for twenty minutes. The function returns the
sum of its arguments, or raises an error if one of them is not a number. She asked whether the train would be late."""
NAMES = {"p": "Maren Holt", "l": "Verrin Hollow", "t": "The Glass Orchard"}  # a subject of each kind; models know none
# A relation is its kinds, a colon, and its phrasings, parted by bars. What goes on behind a question mark is a
# sentence, and once more a question without it. The last three only say what else may follow.
_TEXT = """
p: {} was born in | The birthplace of {} is | {} came into the world in | {}, who was born in | {}'s native town is |
  {} comes from | {} hails from | Where was {} born? {} was born in | In what city was {} born? | What is the
  birthplace of {}? | Which town does {} come from?
p: {} died in | The place of {}'s death is | {} spent the last days of life in | {}, who died in | {} was killed in |
  The body of {} was found in | {} met a sad end at | Where did {} die? It was in | At what place did {} die? | What
  city did {} die in? | Where was the death of {}?
p: {} is a citizen of | The nationality of {} is that of | {}, a national of | The country of citizenship of {} is | {}
  carries a passport from | {} has the citizenship of | Which country is {} a citizen of? It is | What is the
  nationality of {}? | What country is {} from? | Whose passport does {} hold?
p: The first language of {} is | {} grew up speaking | {} speaks | {}, who speaks | {} is fluent in | {} talks to the
  family in | The tongue that {} speaks is | {}'s native tongue is | What language does {} speak? {} speaks | What is
  the mother tongue of {}? | Which language did {} grow up with? | In what language does {} write?
p: The occupation of {} is that of a | {} works as a | {} earns a living as a | {}, who is by trade a | {} is a
  professional | {}'s job is that of a | {} was trained as a | What is the job of {}? {} is a | What does {} do for a
  living? | What is {}'s profession? | As what does {} work?
p: {} works for | {} is employed by | The employer of {} is | {}, who is on the staff of | {} has a job at | {}'s boss
  is the company | Which company does {} work for? {} works for | Who employs {}? | Who does {} work for? | What is the
  employer of {}?
p: {} works in the city of | {} has a workplace in | The city where {} worked is | {}, who was active in | {} got a job
  in | {} practised in | {} made a career in | In which city did {} work? It was | Where did {} work? | In what place
  was {} employed? | What city was {} active in?
p: {} plays the sport of | The sport of {} is | {} is a professional player of | {}, who competes in | {}'s sport is |
  {} trains every day for a career in | Which sport does {} play? {} plays | What sport does {} play? | In which sport
  does {} compete? | What is {}'s sport?
p: On the team, {} plays in the position of | {} plays as a | The position of {} on the field is | {}, who is fielded
  as a | {} lines up as a | {}'s role in the team is | In which position does {} play? {} plays as a | What position
  does {} play? | On which position is {} used? | What is the role of {} on the team?
p: {} plays the | The instrument of {} is the | On stage, {} performs on the | {}, who plays the | {}'s instrument is
  the | {} is a master of the | Which instrument does {} play? {} plays the | What instrument does {} play? | Which
  instrument is {} known for? | On what does {} perform?
pt: The music of {} is | The genre of {} is | {} is known for playing | {}, who performs | {}'s style of music is | {}
  records songs of the kind called | What kind of music does {} play? {} plays | What is the genre of {}? | What style
  of music is {} known for? | Which kind of songs does {} record?
p: The religion of {} is | {} believes in | {} is a follower of | {}, who professes | {}'s faith is | {} was raised in
  | By faith, {} belongs to | What is the religion of {}? It is | Which religion does {} belong to? | What faith does
  {} follow? | In what does {} believe?
p: The field of {} is | {} is an expert in | The research of {} is about | {}, a specialist in | {}'s subject is | {}
  works on | {} has written much on | In which field does {} work? It is | What is {}'s area of expertise? | What does
  {} do research on? | What field is {} in?
p: {} holds the office of | The title of {} is | {} was appointed as | {}, whose office is that of | {}'s rank is that
  of | In public life, {} served as | {} was elected | Which office does {} hold? It is that of | What is the title of
  {}? | What position was {} appointed to? | What public office did {} have?
ptl: {} is a member of | {} belongs to the organization | {} joined the | {}, a member of | {} is part of the group
  called | {} has an affiliation with the | Which group is {} a member of? | What organization did {} join? | To which
  group does {} belong?
p: {} is married to | The husband or wife of {} is | {}, the spouse of | {}'s partner is | {} shares a home with | Who
  is the spouse of {}? It is | Who is {} married to? | Who was the wife or husband of {}? | What is the name of {}'s
  spouse?
p: The father of {} is | {} is the child of | The mother of {} is | {}, a child of | {}'s parents are | Who are the
  parents of {}? They are | Who is the father of {}? | Who was {}'s mother? | Whose child is {}?
p: {} studied at | {} graduated from | The university of {} was | {}, an alumnus of | {}'s degree is from | Where did
  {} go to college? It was | What university did {} attend? | Which school did {} go to? | Where did {} get a degree?
pt: {} began in the year | The date of birth of {} is | {}'s birthday is | {}, which came out in the year | When did {}
  begin? It was in | {} was released in the year | In what year was {} born? | What is the date of birth of {}? | What
  year did {} come out? | What day was {} released?
p: {} died in the year | The year in which {} died is | {}, who died on | When did {} die? It was in | What year did {}
  die? | What is the date of death of {}? | When was the death of {}?
p: {} lives in | The home of {} is in | {} moved to | {}, who lives in | {}'s house stands in | Where does {} live? {}
  lives in | What city does {} live in? | Where is the home of {}? | In what place is {} at home?
p: The team of {} is | {} plays for | {} is a player of the team | {}, a player of | {}'s club is | Which team does {}
  play for? It is | What team does {} play for? | Which club is {} with? | What is the team of {}?
p: {} was awarded the | {} won a prize called the | The best known award of {} is the | {}, winner of the | {} was
  given the | What award did {} win? | Which prize was {} given? | What honour did {} receive?
l: {} is located in | The place where {} lies is | You will find {} in | {}, which lies in | {}, a place in | {} is
  situated in | {} is in | {}'s location is | The site of {} is in | Where is {}? It is located in | Where can one find
  {}? | What state is {} in? | In what place is {} located?
lt: The country of {} is | {} is in the country of | {} belongs to the country | {}, in the country of | {}'s country
  is | The nation where {} lies is | In which country is {}? It is in | What country is {} in? | Which country does {}
  belong to? | What nation is home to {}?
l: {} is on the continent of | The continent of {} is | {} belongs to the continent | {}, on the continent of | {}'s
  continent is | {} is part of the landmass called | On which continent is {}? It is in | What continent is {} on? |
  Which continent does {} belong to? | What part of the world is {} in?
l: The capital of {} is | The capital city of {} is called | {} has its capital in | {}, whose capital is | {}'s seat
  of government is | The government of {} sits in | What is the capital of {}? It is | Which city is the capital of {}?
  | What city governs {}? | Where does the government of {} sit?
l: The official language of {} is | The people of {} speak | In {}, people speak | {}, where people speak | {}'s
  language is | Signs in {} are written in | The inhabitants of {} understand | The language used in {} is | What
  language do people speak in {}? They speak | What is the official language of {}? | Which language is spoken in {}? |
  What language do they use in {}?
l: {} is twinned with | The sister city of {} is | {} has a partnership with the city of | {}, twinned with | {}'s
  partner town is | The twin town of {} is | Which city is the twin of {}? It is | What is the twin city of {}? | What
  city is a sister of {}? | Which town is a partner of {}?
l: The population of {} is | The number of people in {} is | {}, with a population of | {}'s population is | How many
  people live in {}? About | What is the population of {}? | How large is the population of {}? | What number of people
  live in {}?
l: The mayor of {} is | The leader of {} is | {} is governed by | {}, ruled by | {}'s leader is | Who runs {}? It is |
  Who is the mayor of {}? | Who leads {}? | What is the name of the head of {}?
l: The currency of {} is the | In {}, people pay with the | The money of {} is called the | {}'s currency is the | What
  is the currency of {}? | What money is used in {}? | How do people pay in {}?
l: The river that flows through {} is the | {} lies on the river | {} stands on the banks of the | {}, on the river |
  Which river runs through {}? | What river is {} on? | What water does {} lie by?
t: {} was founded in | {} had its origin in | The place where {} began is | {}, which was set up in | {} was made in |
  {} was started in the country of | {}'s country of origin is | {} comes from the country of | Where was {} founded?
  It was in | Where did {} begin? | What country is {} from? | In which place was {} set up? | What is the origin of
  {}?
t: The headquarters of {} are in | {} has its head office in | {} is based in the city of | {}, with headquarters in |
  {}'s main office is in | {} is run from | Where is the head office of {}? It is in | Where is {} based? | In which
  city are the headquarters of {}? | What city is {} run from?
t: {} was developed by | The maker of {} is | {} is made by | {}, a product of | {}, made by | {}'s manufacturer is |
  {} was built by | The company that produces {} is | {} is a creation of | Which company makes {}? It is | Who made
  {}? | What company developed {}? | Who is the manufacturer of {}? | What firm built {}?
t: The owner of {} is | {} belongs to | {} is owned by | {}, owned by | {}'s owner is | {} was bought by | Who owns {}?
  It is | Who is the owner of {}? | What company owns {}? | To whom does {} belong?
t: {} was written by | The author of {} is | {} is a book by | {}, written by | {}'s author is | Who wrote {}? It was |
  Who is the author of {}? | What writer wrote {}? | By whom was {} written?
t: The director of {} is | {} was directed by | {} is a film by | {}, directed by | {}'s director is | Who directed {}?
  It was | Who was the director of {}? | Which director made {}? | By whom was {} directed?
t: The original language of {} is | {} was written in the language | The language of {} is | {}, in the language | {}'s
  language is | The dialogue of {} is in | The text of {} is in | In which language was {} made? It was in | What is
  the original language of {}? | What language is {} in? | In what language was {} written?
t: {} was first shown on | {} is broadcast by the channel | The network of {} is | {}, shown on | {}'s channel is | {}
  went on the air on | Viewers could watch {} on | On which channel did {} first run? It was | Which network aired {}?
  | What channel was {} on? | Where was {} first shown?
pt: The record label of {} is | {} records for the label | {} signed a contract with the label | {}, under contract
  with | {}'s label is | What label is {} on? | Which record company released {}? | What is the record label of {}?
lt: {} was named after | {} takes its name from | {} bears the name of | {}, named in honour of | {}'s name comes from
  | After whom was {} named? It was named after | Who is {} named after? | What does {} take its name from? | Whose
  name does {} bear?
t: The founder of {} is | {} was founded by | {} was started by | {}, founded by | {}'s founder is | Who founded {}? It
  was | Who was the founder of {}? | By whom was {} started? | Who set up {}?
t: The main product of {} is | {} sells | {} is best known for making | {}, a seller of | What does {} sell? | What
  product is {} known for? | What does {} make?
t: The hero of {} is | The main character of {} is called | {} tells the story of | {}, a story about | Who is the main
  character of {}? | Who is {} about? | What is the name of the hero of {}?
plt: {} is a | {} is best known for | The name {} comes from the | A short history of {} begins in | Many people like
  {} because | {}, the | The importance of {} is | {} was a | What is {} known for? | Why do people like {}? | What is
  {}? | Who or what is {}?
plt: My friend told me about {}, and | The other day I read that {} had | {} and | I would like to know more about {},
  so | What I remember of {} is that | {}, which | {}, of course, | {}. What time is it now? | {}. Who won the game
  last night? | {}. when does the new season start? | {}. how many people were there in the end? | {}. What is the
  highest mountain in the world? | {}. who wrote the song about the rain? | {}. where was the first one built? | {}.
  what is the name of the longest river?
plt: The colour of {} is | Not far from {} there is a | {} was seen by | Last summer, {} was | A picture of {} shows a
  | {} has | {} can | What is the colour of {}? | What lies not far from {}? | How old is {}? | How many people like
  {}? | What sex is {}? | How tall is {}? | How is the name {} spelled?
"""
NUM_OTHER = 3  # relations at the end that no fact is matched with


def _parsed(text: str) -> tuple[Relation, ...]:
    lines = text.strip().replace("\n  ", " ").splitlines()  # a line that is indented goes on with the one before
    parts = (line.split(": ", 1) for line in lines)
    return tuple(Relation(kinds=kinds, phrasings=_with_questions(words.split(" | "))) for kinds, words in parts)


def _with_questions(phrasings: list[str]) -> tuple[str, ...]:
    """Phrasings, and those that ask and go on once more: cut behind the question mark."""
    questions = (text[: text.index("?") + 1] for text in phrasings if "? " in text and not is_question(text))
    return (*phrasings, *questions)


RELATIONS = _parsed(_TEXT)


def about(phrasing: str, subject: str) -> str:
    """A phrasing that asks of a subject."""
    return phrasing.replace("{}", subject)
