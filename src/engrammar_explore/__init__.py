"""The explorer: what the memory and the patches of a model do to a text, as data, as a page, as one file.

Public: looking.look, looking.see, looking.overview, looking.closer; census.build_census, census.Census;
trying.try_fact; session.Session; serving.Server; export.export_page.
"""
