"""The certificate: the same numbers in every layout, proved before a run is trained."""
