"""Routers in the models of other packages, each of which is imported when it is used."""
