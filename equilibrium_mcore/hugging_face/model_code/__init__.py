"""The modelling code that travels with every exported folder."""
