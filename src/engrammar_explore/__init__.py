"""The explorer: what the memory and the patches of a model do to a text, as data, as a page, as one file.

Public: looking.look, looking.see, looking.overview, looking.closer; census.build_census, census.open_census;
trying.try_facts; session.Session; serving.serve; export.export_page.
"""
